"""Crashes lose no admitted request, and less than the documented number of tokens."""

import asyncio
import json
import random
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
from tests.integration.usage.conftest import COSTS, RECOVERY_TIMEOUT_SECONDS, LedgerOpener, crash, stored
from tests.integration.usage.expected_records import Expected, check_all

from llama2_server.usage.errors import LedgerError
from llama2_server.usage.ledger import PROGRESS_TOKENS, Ledger
from llama2_server.usage.local import statements
from llama2_server.usage.pricing import TokenUsage, neurons
from llama2_server.usage.records import INTERRUPTED

OUTCOMES = ("END_OF_SEQUENCE", "STOP_SEQUENCE", "MAX_TOKENS", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL")


class History:
    """A random history of a data directory: requests of two servers at a time, crashes and restarts."""

    def __init__(self, seed: int, url: str | None, open_ledger: LedgerOpener) -> None:
        self.expected: dict[str, Expected] = {}
        self._draw = random.Random(seed)
        self._url = url
        self._open_ledger = open_ledger
        self._ledgers: list[Ledger] = []
        self._running: dict[str, Ledger] = {}

    async def run(self, steps: int) -> None:
        self._ledgers = [await self._open_ledger(url=self._url) for _ in range(2)]
        actions = [self._admit, self._progress, self._finish, self._pause, self._restart]
        for _ in range(steps):
            [action] = self._draw.choices(actions, [20, 60, 18, 8, 1])
            await action()
        for ledger in self._ledgers:
            await crash(ledger)
        last = await self._open_ledger(url=self._url)
        assert await last.flush(RECOVERY_TIMEOUT_SECONDS)
        await last.close()

    async def _admit(self) -> None:
        request_id = f"{len(self.expected)}"
        account_id = f"account-{self._draw.randrange(5)}"
        ledger = self._draw.choice(self._ledgers)
        await ledger.admit(request_id, account_id, "model")
        self._running[request_id] = ledger
        self.expected[request_id] = Expected(account_id)

    async def _progress(self) -> None:
        if self._running:
            request_id = self._draw.choice(list(self._running))
            before = self.expected[request_id].tokens
            after = TokenUsage(before.input_tokens or self._draw.randrange(1, 3000), before.output_tokens + 7)
            self._running[request_id].progress(request_id, after)
            await self._running[request_id].commit()
            self.expected[request_id].tokens = after

    async def _finish(self) -> None:
        if self._running:
            request_id = self._draw.choice(list(self._running))
            expected = self.expected[request_id]
            expected.cached = expected.tokens.input_tokens == 0 and self._draw.random() < 0.5
            expected.outcome = self._draw.choice(OUTCOMES)
            expected.tokens = TokenUsage(expected.tokens.input_tokens, expected.tokens.output_tokens + 1)
            ledger = self._running.pop(request_id)
            ledger.finish(request_id, expected.outcome, expected.tokens, cached=expected.cached)
            await ledger.commit()

    async def _pause(self) -> None:
        """Let the ledgers store records, for a short time or until all are stored."""
        if self._draw.random() < 0.2:
            assert await self._draw.choice(self._ledgers).flush(RECOVERY_TIMEOUT_SECONDS)
        for _ in range(self._draw.randrange(20)):
            await asyncio.sleep(0)

    async def _restart(self) -> None:
        """Kill one of the servers, or stop it gracefully while requests run."""
        number = self._draw.randrange(2)
        stopped = self._ledgers[number]
        await (crash(stopped) if self._draw.random() < 0.7 else stopped.close())
        self._running = {one: ledger for one, ledger in self._running.items() if ledger is not stopped}
        self._ledgers[number] = await self._open_ledger(url=self._url)


async def test_a_start_that_fails_leaves_the_recovery_to_the_next_one(
    tmp_path: Path, open_ledger: LedgerOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk is full when the requests of a killed server are ended, the next start ends them."""
    ledger = await open_ledger()
    await ledger.admit("one", "a", "model")
    await ledger.commit()
    await crash(ledger)
    with monkeypatch.context() as patch:
        full = Mock(side_effect=sqlite3.OperationalError("database or disk is full"))
        patch.setattr(statements, "interrupt", full)
        with pytest.raises(LedgerError, match="disk is full"):
            await open_ledger()
    await open_ledger()
    assert [record.outcome for record in await stored(None, tmp_path)] == [INTERRUPTED]


@pytest.mark.parametrize("seed", range(3))
async def test_random_history_leaves_one_record_per_request(
    tmp_path: Path, url: str | None, open_ledger: LedgerOpener, seed: int
) -> None:
    """After crashes and restarts, hundreds of requests have one record each, with the computed tokens and neurons."""
    history = History(seed, url, open_ledger)
    await history.run(steps=1500)
    assert len(history.expected) > 200
    check_all(await stored(url, tmp_path), history.expected)


KILLED_SERVER = """
import asyncio, itertools, json, sys
from decimal import Decimal
from pathlib import Path
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import TokenUsage
from llama2_server.usage.store import Store

def report(*event):
    print(json.dumps(event), flush=True)

async def main(directory, url):
    costs = {"input_tokens": Decimal("0.3672"), "output_tokens": Decimal("0.000000001")}
    store = Store(url) if url else None
    ledger = await Ledger.open(data_directory=Path(directory), store=store, neuron_costs=costs)
    for number in itertools.count():
        await ledger.admit(f"{number}", "acme", "model")
        report("admitted", number, 0)
        for token in range(1, 40 if number % 3 else 400):
            ledger.progress(f"{number}", TokenUsage(100, token))
            await ledger.commit()
            report("token", number, token)
        report("finishing", number, token)
        ledger.finish(f"{number}", "MAX_TOKENS", TokenUsage(100, token))
        await ledger.commit()
        report("finished", number, token)

asyncio.run(main(*sys.argv[1:]))
"""


class KilledServer:
    """A process with a ledger, which prints its events until it is killed."""

    def __init__(self, directory: Path, url: str | None) -> None:
        command = [sys.executable, "-c", KILLED_SERVER, str(directory), url or ""]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._events: list[tuple[str, int, int]] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_for(self, events: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._events) >= events, timeout=RECOVERY_TIMEOUT_SECONDS)

    def kill(self) -> list[tuple[str, int, int]]:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        return self._events

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                if line.endswith("]\n"):
                    with self._changed:
                        self._events.append(tuple(json.loads(line)))
                        self._changed.notify_all()


@pytest.mark.parametrize("events", [50, 3000])
async def test_sigkill_in_the_middle(tmp_path: Path, url: str | None, open_ledger: LedgerOpener, events: int) -> None:
    """After SIGKILL, the running request is INTERRUPTED within the documented loss, and the others are exact."""
    killed = KilledServer(tmp_path, url)
    await asyncio.to_thread(killed.wait_for, events)
    # A second server in the same directory does not end the requests of the running one.
    second = await open_ledger(url=url)
    await second.close()
    assert not [record for record in await stored(url, tmp_path) if record.outcome == INTERRUPTED]
    reported = killed.kill()
    ledger = await open_ledger(url=url)
    assert await ledger.flush(RECOVERY_TIMEOUT_SECONDS)
    records = {int(record.request_id): record for record in await stored(url, tmp_path)}
    last = max(number for _, number, _ in reported)
    assert records.keys() - {last + 1} == set(range(last + 1))  # one more request may have started without a report
    for kind, number, tokens in reported:
        record = records[number]
        assert record.neurons == neurons(TokenUsage(record.input_tokens, record.output_tokens), COSTS)
        if kind == "finished":
            assert (record.outcome, record.input_tokens, record.output_tokens) == ("MAX_TOKENS", 100, tokens)
        if kind == "token":
            assert record.input_tokens == 100
            assert record.output_tokens > tokens - PROGRESS_TOKENS
