"""Two server processes, restarted one after the other under load: with the client's retries, no call fails."""

import asyncio
import signal
import subprocess
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from tests.integration.usage.conftest import stored
from tests.support.processes import card_file, free_ports, server
from tests.support.repository import ROOT

from llama2_client import Client

CLIENTS = 6
CALLS_BETWEEN = 30


@dataclass
class Load:
    """Clients that make one call after another until `stopping` is set, and their results."""

    stopping: bool = False
    request_ids: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    counted: int = 0
    progress: asyncio.Event = field(default_factory=asyncio.Event)

    async def call(self, client: Client, number: int) -> None:
        """Make calls of the three RPCs in turn."""
        turn = number
        while not self.stopping:
            turn += 1
            try:
                if turn % 3 == 0:
                    await client.count_tokens("Hello")
                    self.counted += 1
                elif turn % 3 == 1:
                    self.request_ids.append((await client.generate("Hello", max_tokens=6)).request_id)
                else:
                    stream = client.stream("Hello", max_tokens=6)
                    async for _ in stream:
                        pass
                    self.request_ids.append(stream.reply.request_id)
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            self.progress.set()

    async def wait_for(self, calls: int) -> None:
        """Wait for this number of additional calls."""
        target = len(self.request_ids) + self.counted + calls
        while len(self.request_ids) + self.counted < target and not self.failures:
            self.progress.clear()
            await self.progress.wait()


@pytest.mark.timeout(300)
async def test_no_call_fails_in_a_rolling_restart(tmp_path: Path) -> None:
    """Each server drains, ends with exit code 0 and restarts while clients continue; each reply has one record."""
    ports = free_ports(2)
    demo = ROOT / "server/llama2_server/demo"
    # A practically unlimited quota and no cache: every call runs the model.
    card = card_file(tmp_path, max_requests_per_min={"default": 10**6}, infer_response_cache=None)
    flags = ["--card", str(card), "--weights", str(demo)]
    folders = [tmp_path / f"server{index}" for index in range(2)]
    with ExitStack() as stack:

        async def start(index: int) -> subprocess.Popen[str]:
            listen = ["--listen", f"127.0.0.1:{ports[index]}"]
            entering = partial(stack.enter_context, server(folders[index], *flags, *listen))
            process, _ = await asyncio.to_thread(entering)
            return process

        for folder in folders:
            folder.mkdir()
        processes = list(await asyncio.gather(start(0), start(1)))
        target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
        load = Load()
        async with Client(target, timeout=60) as shared, Client(target, timeout=60) as own:
            clients = [asyncio.create_task(load.call(own if n == 0 else shared, n)) for n in range(CLIENTS)]
            await load.wait_for(CALLS_BETWEEN)
            for index in range(2):
                processes[index].send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(processes[index].wait, 60) == 0
                processes[index] = await start(index)
            await load.wait_for(CALLS_BETWEEN)
            load.stopping = True
            await asyncio.gather(*clients)
        for process in processes:
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 60) == 0
    assert load.failures == []
    records = [record for folder in folders for record in await stored(f"sqlite:///{folder / 'usage.db'}")]
    complete = {record.request_id for record in records if record.outcome in ("MAX_TOKENS", "END_OF_SEQUENCE")}
    assert set(load.request_ids) == complete
    assert len(load.request_ids) == len(complete)
    # A call that a draining server rejects has a record only if it was admitted.
    assert {outcome for outcome, _ in Counter(record.outcome for record in records).items()} <= {
        "MAX_TOKENS",
        "END_OF_SEQUENCE",
        "UNAVAILABLE",
    }
