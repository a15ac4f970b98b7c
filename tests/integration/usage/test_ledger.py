"""Exactly one record per admitted request, exact to the last digit, whatever dies in between."""

import asyncio
import json
import logging
import random
import sqlite3
import subprocess
import sys
import threading
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import count
from pathlib import Path

import pytest
from tests.integration.usage.conftest import COSTS, LedgerOpener, crash, locked, stored
from tests.support.postgres_server import PostgresCluster

from llama2_server.errors import UsageJournalFull, UsageUnavailable
from llama2_server.usage.errors import LedgerError
from llama2_server.usage.journal.journal import PROGRESS_TOKENS
from llama2_server.usage.ledger import Ledger, default_url, read_totals
from llama2_server.usage.pricing import ZERO_TOKENS, TokenUsage, neurons
from llama2_server.usage.records import INTERRUPTED, DailyUsage, UsageRecord

ENDS = ("END_OF_SEQUENCE", "STOP_SEQUENCE", "MAX_TOKENS", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL")
SOON = 20.0  # longer than any recovery takes


@dataclass
class Expected:
    """What the model of the ledger knows of one request."""

    account_id: str
    tokens: TokenUsage = ZERO_TOKENS
    outcome: str = INTERRUPTED  # unless it ends
    cached: bool = False

    def check(self, record: UsageRecord) -> None:
        """Exact for a request that ended; within the stated loss for one that was interrupted."""
        assert (record.account_id, record.outcome) == (self.account_id, self.outcome)
        assert (record.cached, record.input_tokens) == (self.cached, self.tokens.input_tokens)
        lost = self.tokens.output_tokens - record.output_tokens
        assert lost == 0 if self.outcome != INTERRUPTED else 0 <= lost < PROGRESS_TOKENS
        computed = TokenUsage(record.input_tokens, record.output_tokens)
        assert record.neurons == (0 if self.cached else neurons(computed, COSTS))


def check_all(records: list[UsageRecord], expected: dict[str, Expected]) -> None:
    by_id = {record.request_id: record for record in records}
    assert len(by_id) == len(records)
    assert by_id.keys() == expected.keys()
    for request_id, one in expected.items():
        one.check(by_id[request_id])


def request_of(ledger: Ledger, request_id: str, account: str = "acme", outputs: int = 5) -> None:
    """One request from its admission to its end."""
    ledger.admit(request_id, account, "model")
    ledger.finish(request_id, "MAX_TOKENS", TokenUsage(3, outputs))


def end_until_full(ledger: Ledger) -> int:
    """Requests 0, 1, 2, ... from admission to end, and how many of them there were."""
    for number in count():
        try:
            request_of(ledger, f"{number}")
        except UsageJournalFull:
            return number
    raise AssertionError


class History:
    """A random life of a data directory: requests of two servers at a time, crashes, restarts."""

    def __init__(self, seed: int, url: str, open_ledger: LedgerOpener) -> None:
        self.expected: dict[str, Expected] = {}
        self._draw = random.Random(seed)
        self._url = url
        self._open_ledger = open_ledger
        self._ledgers: list[Ledger] = []
        self._running: dict[str, Ledger] = {}

    async def live(self, steps: int) -> None:
        self._ledgers = [await self._open_ledger(url=self._url) for _ in range(2)]
        actions = [self._admit, self._progress, self._finish, self._pause, self._restart]
        for _ in range(steps):
            [action] = self._draw.choices(actions, [20, 60, 18, 8, 1])
            await action()
        for ledger in self._ledgers:
            await crash(ledger)
        last = await self._open_ledger(url=self._url)
        assert await last.flush(SOON)
        await last.close()

    async def _admit(self) -> None:
        request_id = f"{len(self.expected)}"
        account = f"account-{self._draw.randrange(5)}"
        ledger = self._draw.choice(self._ledgers)
        ledger.admit(request_id, account, "model")
        self._running[request_id] = ledger
        self.expected[request_id] = Expected(account)

    async def _progress(self) -> None:
        if self._running:
            request_id = self._draw.choice(list(self._running))
            before = self.expected[request_id].tokens
            after = TokenUsage(before.input_tokens or self._draw.randrange(1, 3000), before.output_tokens + 7)
            self._running[request_id].progress(request_id, after)
            self.expected[request_id].tokens = after

    async def _finish(self) -> None:
        if self._running:
            request_id = self._draw.choice(list(self._running))
            expected = self.expected[request_id]
            expected.cached = expected.tokens.input_tokens == 0 and self._draw.random() < 0.5
            expected.outcome = self._draw.choice(ENDS)
            expected.tokens = TokenUsage(expected.tokens.input_tokens, expected.tokens.output_tokens + 1)
            self._running.pop(request_id).finish(request_id, expected.outcome, expected.tokens, cached=expected.cached)

    async def _pause(self) -> None:
        """Let the ledgers write, for a while or until all is written."""
        if self._draw.random() < 0.2:
            assert await self._draw.choice(self._ledgers).flush(SOON)
        for _ in range(self._draw.randrange(20)):
            await asyncio.sleep(0)

    async def _restart(self) -> None:
        """One of the servers is killed, or stops in good order with requests that still run."""
        number = self._draw.randrange(2)
        stopped = self._ledgers[number]
        await (crash(stopped) if self._draw.random() < 0.7 else stopped.close())
        self._running = {one: ledger for one, ledger in self._running.items() if ledger is not stopped}
        self._ledgers[number] = await self._open_ledger(url=self._url)


@pytest.mark.parametrize("seed", range(3))
async def test_any_history_leaves_one_record_each(url: str, open_ledger: LedgerOpener, seed: int) -> None:
    """Hundreds of requests through crashes and restarts: one record each, tokens and neurons as computed."""
    history = History(seed, url, open_ledger)
    await history.live(steps=1500)
    assert len(history.expected) > 200
    check_all(await stored(url), history.expected)


KILLED_SERVER = """
import asyncio, itertools, json, sys
from decimal import Decimal
from pathlib import Path
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import TokenUsage

def say(*event):
    print(json.dumps(event), flush=True)

async def main(directory, url):
    costs = {"input_tokens": Decimal("0.3672"), "output_tokens": Decimal("0.000000001")}
    ledger = await Ledger.open(data_directory=Path(directory), url=url, neuron_costs=costs)
    for number in itertools.count():
        ledger.admit(f"{number}", "acme", "model")
        say("admitted", number, 0)
        for token in range(1, 40 if number % 3 else 400):
            ledger.progress(f"{number}", TokenUsage(100, token))
            say("token", number, token)
        say("finishing", number, token)
        ledger.finish(f"{number}", "MAX_TOKENS", TokenUsage(100, token))
        say("finished", number, token)
        await asyncio.sleep(0.001)

asyncio.run(main(*sys.argv[1:]))
"""


class KilledServer:
    """A process with a ledger, which says what it does, until it is killed."""

    def __init__(self, directory: Path, url: str) -> None:
        command = [sys.executable, "-c", KILLED_SERVER, str(directory), url]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._said: list[tuple[str, int, int]] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_for(self, events: int) -> None:
        with self._news:
            assert self._news.wait_for(lambda: len(self._said) >= events, timeout=SOON)

    def kill(self) -> list[tuple[str, int, int]]:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        return self._said

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                if line.endswith("]\n"):
                    with self._news:
                        self._said.append(tuple(json.loads(line)))
                        self._news.notify_all()


@pytest.mark.parametrize("events", [50, 3000])
async def test_sigkill_in_the_middle(tmp_path: Path, url: str, open_ledger: LedgerOpener, events: int) -> None:
    """After SIGKILL the running request is INTERRUPTED within the stated loss, the others are exact."""
    killed = KilledServer(tmp_path, url)
    await asyncio.to_thread(killed.wait_for, events)
    # A second server on the same directory, while the first one lives, leaves it alone.
    neighbour = await open_ledger(url=url)
    assert neighbour.pending == 0
    await neighbour.close()
    assert not [record for record in await stored(url) if record.outcome == INTERRUPTED]
    said = killed.kill()
    ledger = await open_ledger(url=url)
    assert await ledger.flush(SOON)
    records = {int(record.request_id): record for record in await stored(url)}
    last = max(number for _, number, _ in said)
    assert records.keys() - {last + 1} == set(range(last + 1))  # one more may have died before it could be told
    for kind, number, tokens in said:
        record = records[number]
        assert record.neurons == neurons(TokenUsage(record.input_tokens, record.output_tokens), COSTS)
        if kind == "finished":
            assert (record.outcome, record.input_tokens, record.output_tokens) == ("MAX_TOKENS", 100, tokens)
        if kind == "token":
            assert record.input_tokens == 100
            assert record.output_tokens > tokens - PROGRESS_TOKENS


async def test_two_servers_on_one_store(tmp_path: Path, url: str, open_ledger: LedgerOpener) -> None:
    """50 clients of 5 actokens on two servers, 10% cancelling: one record each, neurons exact to the last digit."""
    ledgers = [await open_ledger(url=url, data_directory=tmp_path / name) for name in ("one", "two")]
    spent: dict[str, Decimal] = {f"account-{number}": Decimal(0) for number in range(5)}
    draw = random.Random(5)

    async def client(number: int) -> None:
        account, ledger = f"account-{number % 5}", ledgers[number % 2]
        for request in range(10):
            request_id = f"{number}.{request}"
            ledger.admit(request_id, account, "model")
            tokens = TokenUsage(draw.randrange(1, 3000), draw.randrange(2500))
            ledger.progress(request_id, tokens)
            await asyncio.sleep(0)
            ledger.finish(request_id, "CANCELLED" if draw.random() < 0.1 else "MAX_TOKENS", tokens)
            spent[account] += neurons(tokens, COSTS)

    await asyncio.gather(*(client(number) for number in range(50)))
    await ledgers[1].close()
    for account, neurons_spent in spent.items():
        [total] = await ledgers[0].totals(account)
        assert (total.requests, total.neurons) == (100, neurons_spent)
    assert len(await stored(url)) == 500


async def test_totals_hold_what_has_just_ended(url: str, open_ledger: LedgerOpener) -> None:
    """A caller sees the request that it finished a moment ago, under the UTC day on which it started."""
    times = [datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC) + timedelta(seconds=second) for second in range(8)]
    ledger = await open_ledger(url=url, now=lambda: times.pop(0))
    request_of(ledger, "first")  # January to February
    ledger.admit("second", "acme", "model")
    ledger.finish("second", "END_OF_SEQUENCE", TokenUsage(3, 5), cached=True)
    request_of(ledger, "third", "other")
    days = [date(2026, 1, 31), date(2026, 2, 1)]
    price = neurons(TokenUsage(3, 5), COSTS)
    january = DailyUsage("acme", days[0], "model", 1, 0, 3, 5, 0, 0, price)
    february = DailyUsage("acme", days[1], "model", 1, 1, 0, 0, 3, 5, Decimal(0))
    assert await ledger.totals("acme") == [january, february]
    assert await ledger.totals("acme", since=days[1]) == [february]
    assert await ledger.totals("acme", until=days[0]) == [january]
    assert await read_totals(url) == [january, february, *await ledger.totals("other")]
    await ledger.close()


async def test_locked_store_loses_and_doubles_nothing(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """While the store is locked the journal fills, then refuses; once it is free all is written and work goes on."""
    ledger = await open_ledger(journal_limit_bytes=64 * 1024)
    request_of(ledger, "before")
    assert await ledger.flush(SOON)
    with locked(tmp_path / "usage.db"):
        ledger.admit("long", "acme", "model")
        ended = end_until_full(ledger)
        assert not await ledger.flush(0.1)
        assert ledger.pending == ended > 50
        assert 0 < ledger.journal_bytes <= 64 * 1024
        assert ledger.lag_seconds > 0
    assert await ledger.flush(SOON)
    assert (ledger.pending, ledger.lag_seconds) == (0, 0)
    request_of(ledger, "after")
    ledger.finish("long", "MAX_TOKENS", TokenUsage(3, 5))
    await ledger.close()
    names = ["before", "long", "after", *(f"{number}" for number in range(ended))]
    outcome = Expected("acme", TokenUsage(3, 5), "MAX_TOKENS")
    check_all(await stored(default_url(tmp_path)), dict.fromkeys(names, outcome))


async def test_store_that_fails_is_tried_again(
    tmp_path: Path, open_ledger: LedgerOpener, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that answers with an error is said to be down once, and gets its records when it is mended."""
    caplog.set_level(logging.INFO)
    ledger = await open_ledger()
    with sqlite3.connect(tmp_path / "usage.db", isolation_level=None) as connection:
        connection.execute("ALTER TABLE usage_records RENAME TO mislaid")
        request_of(ledger, "one")
        with pytest.raises(UsageUnavailable):
            await ledger.totals("acme")
        connection.execute("ALTER TABLE mislaid RENAME TO usage_records")
    connection.close()
    assert await ledger.flush(SOON)
    assert [record.request_id for record in await stored(default_url(tmp_path))] == ["one"]
    assert [record.message.split(",")[0] for record in caplog.records if "the usage store" in record.message] == [
        "the usage store is unavailable",
        "the usage store is available again",
    ]


async def test_postgresql_that_stops_and_comes_back(
    tmp_path: Path, postgres: PostgresCluster, open_ledger: LedgerOpener, caplog: pytest.LogCaptureFixture
) -> None:
    """Servers go on, start, stop and are killed while the database is away: nothing is lost, doubled or leaked."""
    url = postgres.new_database()
    ledger = await open_ledger(url=url)
    for number in range(700):
        request_of(ledger, f"{number}")
    await asyncio.to_thread(postgres.stop)  # in the middle of writing them, or not
    for number in range(700, 1400):
        request_of(ledger, f"{number}")
    with pytest.raises(UsageUnavailable):
        await ledger.totals("acme")
    killed = await open_ledger(url=url)
    request_of(killed, "of the killed")
    await crash(killed)
    closed = await open_ledger(url=url, data_directory=tmp_path / "closed")
    request_of(closed, "of the closed")
    await closed.close(0.1)
    heir = await open_ledger(url=url)
    assert heir.pending == 1
    await asyncio.to_thread(postgres.start)
    assert await ledger.flush(SOON)
    assert await heir.flush(SOON)
    again = await open_ledger(url=url, data_directory=tmp_path / "closed")
    assert await again.flush(SOON)
    names = ["of the killed", "of the closed", *(f"{number}" for number in range(1400))]
    check_all(await stored(url), dict.fromkeys(names, Expected("acme", TokenUsage(3, 5), "MAX_TOKENS")))
    assert "s3cret" not in caplog.text
    for one in (ledger, heir, again):
        await one.close()


async def test_progress_is_told_from_another_thread(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """The engine's thread may tell progress while the event loop admits and ends other requests."""
    ledger = await open_ledger(journal_limit_bytes=1024 * 1024)
    ledger.admit("long", "acme", "model")

    def engine() -> None:
        for token in range(1, 20_001):
            ledger.progress("long", TokenUsage(9, token))

    thread = threading.Thread(target=engine)
    thread.start()
    number = 0
    while thread.is_alive():
        request_of(ledger, f"{number}")
        number += 1
        if number % 50 == 0:
            assert await ledger.flush(SOON)
    await crash(ledger)
    expected = {f"{one}": Expected("acme", TokenUsage(3, 5), "MAX_TOKENS") for one in range(number)}
    expected["long"] = Expected("acme", TokenUsage(9, 20_000))
    ledger = await open_ledger()
    assert await ledger.flush(SOON)
    await ledger.close()
    check_all(await stored(default_url(tmp_path)), expected)
    assert list((tmp_path / "journal").iterdir()) == []


async def test_price_beyond_the_ledger_is_refused(open_ledger: LedgerOpener) -> None:
    """A price that could not be kept exactly stops the start."""
    with pytest.raises(LedgerError, match=r"^neuron_cost of input_tokens: 1E-10 has more than 9 decimals; round it$"):
        await open_ledger(neuron_costs={"input_tokens": Decimal("1e-10")})


async def test_store_that_cannot_be_stops_the_start(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """A file where no file can be, or a directory that is a file, is told in one line; nothing is left behind."""
    with pytest.raises(LedgerError, match=r"^--usage-url: .*unable to open database file"):
        await open_ledger(url=f"sqlite:///{tmp_path}/nowhere/usage.db")
    with pytest.raises(LedgerError, match=r"^--usage-url: "):
        await open_ledger(url="usage.db")
    assert list((tmp_path / "journal").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match=r"^--data-directory: .*file: Not a directory"):
        await open_ledger(data_directory=tmp_path / "file")


async def test_unknown_database_stops_the_start(postgres: PostgresCluster, open_ledger: LedgerOpener) -> None:
    """What waiting does not mend is not waited for."""
    with pytest.raises(LedgerError, match=r'^--usage-url: .*database "nowhere" does not exist$'):
        await open_ledger(url=postgres.new_database().rpartition("/")[0] + "/nowhere")
