"""Two server processes, restarted one after the other under load: with the client's retries, no call fails.

The servers have what the pods of the chart have: a data directory each, also while the usage store is down.
"""

import asyncio
import signal
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from tests.helm.chart import rendered
from tests.integration.usage.conftest import stored
from tests.support.processes import card_file, command, environment, free_ports, server
from tests.support.repository import ROOT
from tests.support.servers.postgres_server import running_postgres

from llama2_client import Client
from llama2_server.usage.records import UsageRecord

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


class Servers:
    """Two server processes, each with its data directory, which restart at the same addresses."""

    def __init__(self, folder: Path, stack: ExitStack, *flags: str) -> None:
        # Practically unlimited quotas and no cache: every call runs the model, however fast the machine is.
        card = card_file(folder, max_requests_per_min={"default": 10**6}, infer_response_cache=None)
        demo = ROOT / "server/llama2_server/demo"
        self._flags = ["--card", str(card), "--weights", str(demo), "--max-free-calls-per-minute", str(10**9), *flags]
        self._stack = stack
        self._addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self.folders = [folder / f"server{index}" for index in range(2)]
        self.target = "ipv4:" + ",".join(self._addresses)
        for data in self.folders:
            data.mkdir()

    async def start(self, index: int) -> None:
        """Start a server, and return when it serves."""
        flags = [*self._flags, "--listen", self._addresses[index]]
        entering = partial(self._stack.enter_context, server(self.folders[index], *flags))
        self._processes[index], _ = await asyncio.to_thread(entering)

    async def stop(self, index: int) -> None:
        """Let a server drain, and check that it ends with exit code 0."""
        self._processes[index].send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(self._processes[index].wait, 60) == 0

    async def restart_each(self) -> None:
        """Stop and start one server after the other."""
        for index in range(2):
            await self.stop(index)
            await self.start(index)


@asynccontextmanager
async def running_load(target: str) -> AsyncIterator[Load]:
    """Make calls during the body of the `with`; one of the clients does not share its connections."""
    load = Load()
    async with Client(target, timeout=60) as shared, Client(target, timeout=60) as own:
        clients = [asyncio.create_task(load.call(own if n == 0 else shared, n)) for n in range(CLIENTS)]
        try:
            yield load
        finally:
            load.stopping = True
            await asyncio.gather(*clients)
    assert load.failures == []


@pytest.mark.timeout(300)
async def test_no_call_fails_in_a_rolling_restart(tmp_path: Path) -> None:
    """Each server drains, ends with exit code 0 and restarts while clients continue; each reply has one record."""
    with ExitStack() as stack:
        servers = Servers(tmp_path, stack)
        await asyncio.gather(servers.start(0), servers.start(1))
        async with running_load(servers.target) as load:
            await load.wait_for(CALLS_BETWEEN)
            await servers.restart_each()
            await load.wait_for(CALLS_BETWEEN)
        await asyncio.gather(servers.stop(0), servers.stop(1))
    records = [record for folder in servers.folders for record in await stored(f"sqlite:///{folder / 'usage.db'}")]
    check_records(records, load)


@pytest.mark.timeout(300)
async def test_no_record_is_lost_without_postgresql(tmp_path: Path) -> None:
    """PostgreSQL is down while both servers restart and the second one leaves; later, each reply has one record there.

    The server that remains forwards its records. The chart's Job forwards the records on the other's claim.
    """
    with running_postgres() as postgres, ExitStack() as stack:
        usage_url = postgres.new_database()
        servers = Servers(tmp_path, stack, "--usage-url", usage_url)
        await asyncio.gather(servers.start(0), servers.start(1))
        async with running_load(servers.target) as load:
            await load.wait_for(CALLS_BETWEEN)
            postgres.stop()
            await load.wait_for(CALLS_BETWEEN)
            await servers.restart_each()
            await load.wait_for(CALLS_BETWEEN)
            await servers.stop(1)
            await load.wait_for(CALLS_BETWEEN)
        left = [len(await stored(None, folder)) for folder in servers.folders]
        assert min(left) > 0, "no record was waiting for PostgreSQL"
        postgres.start()
        async with asyncio.timeout(60):
            while await stored(None, servers.folders[0]):
                await asyncio.sleep(0)
        await asyncio.to_thread(run_forward_job, servers.folders[1], usage_url)
        assert await stored(None, servers.folders[1]) == []
        await servers.stop(0)
        check_records(await stored(usage_url), load)


def run_forward_job(claim: Path, usage_url: str) -> None:
    """Run the command of the chart's Job `forward` on a data directory."""
    (container,) = rendered("everything-on").of("Job")[0]["spec"]["template"]["spec"]["containers"]
    program, *words = container["command"] + container["args"]
    assert program == "llama2-server"
    words = [word.replace("=/data", f"={claim}") for word in words]
    subprocess.run(command(*words), check=True, env=environment(LLAMA2_USAGE_URL=usage_url))


def check_records(records: Sequence[UsageRecord], load: Load) -> None:
    """Check that each reply has one record, and that only calls rejected by a drain have others."""
    complete = {record.request_id for record in records if record.outcome in ("MAX_TOKENS", "END_OF_SEQUENCE")}
    assert set(load.request_ids) == complete
    assert len(load.request_ids) == len(complete) == sum(record.outcome != "UNAVAILABLE" for record in records)
    # A call that a draining server rejects has a record only if it was admitted.
    assert {record.outcome for record in records} <= {"MAX_TOKENS", "END_OF_SEQUENCE", "UNAVAILABLE"}
