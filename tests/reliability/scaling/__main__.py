"""Measure what docs/scaling.md states about two replicas: `python -m tests.reliability.scaling`.

Two server processes with the demo model share a real Redis and a real PostgreSQL, behind the chart's Envoy. It checks
quota, cache, balance, the kill of a replica and a drain, and prints one line for each.
"""

import asyncio
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa
from tests.helm.chart import render
from tests.helm.routing.envoy_pod import running_envoy_pod
from tests.support.processes import command, environment, server
from tests.support.servers.envoy_server import Envoy
from tests.support.servers.name_server import running_name_server
from tests.support.servers.postgres_server import running_postgres
from tests.support.servers.redis_server import running_redis
from tests.support.service import ONE_PORT_HOSTS

from llama2_client import Client
from llama2_client.errors import Llama2Error
from llama2_server.usage.database import create_engine
from llama2_server.usage.schema import usage_records

HOSTS = ONE_PORT_HOSTS[:2]
PROMPT = "Tell me a story about a fox."
QUOTA, LOAD_QUOTA = 60, 1_000_000
CONCURRENT, CALLS = 8, 100
COMPLETE = ("END_OF_SEQUENCE", "MAX_TOKENS")


@dataclass
class Replicas:
    """Two replicas behind Envoy, and what the measurements need of them."""

    stack: AsyncExitStack
    folder: Path
    flags: tuple[str, ...]
    keys: dict[str, str]
    usage_url: str
    envoy: Envoy = field(init=False)
    addresses: list[str] = field(default_factory=list)
    processes: list["subprocess.Popen[str]"] = field(default_factory=list)

    def start(self, host: str) -> None:
        """Start the replica of a host, or start it again with its data directory."""
        data = self.folder / host
        data.mkdir(exist_ok=True)
        port = self.addresses[0].rpartition(":")[2] if self.addresses else "0"
        process, address = self.stack.enter_context(server(data, *self.flags, listen=f"{host}:{port}"))
        index = HOSTS.index(host)
        self.addresses[index:], self.processes[index:] = (
            [address, *self.addresses[index + 1 :]],
            [process, *self.processes[index + 1 :]],
        )

    async def start_envoy(self) -> None:
        """Start the chart's Envoy, which finds both replicas by one name."""
        names = self.stack.enter_context(running_name_server(*HOSTS))
        release = render({"demo": True, "envoy": {"enabled": True}})
        port = self.addresses[0].rpartition(":")[2]
        self.envoy = await self.stack.enter_async_context(running_envoy_pod(release, self.folder, f"x:{port}", names))

    def client(self, account: str, address: str | None = None) -> Client:
        """Return a client of an account: of one replica, or by default of Envoy."""
        return Client(address or self.envoy.address, api_key=self.keys[account])

    async def records(self, account: str) -> int:
        """Return the number of successful requests of an account that PostgreSQL has."""
        engine = create_engine(self.usage_url)
        try:
            async with engine.connect() as connection:
                chosen = sa.select(sa.func.count()).where(
                    usage_records.c.account_id == account, usage_records.c.outcome.in_(COMPLETE)
                )
                return int((await connection.execute(chosen)).scalar_one())
        finally:
            await engine.dispose()


def run(*arguments: str) -> str:
    """Run a command of the server, and return its output."""
    return subprocess.run(command(*arguments), check=True, capture_output=True, text=True, env=environment()).stdout


def new_keys(path: Path) -> dict[str, str]:
    """Write an API keys file with one account for each measurement; return the keys."""
    keys = {}
    for account in ("quota", "cache", "balance", "kill", "drain"):
        limit = QUOTA if account == "quota" else LOAD_QUOTA
        keys[account] = next(
            word for word in run("keys", "new", account, "--api-keys-file", str(path)).split() if word.startswith("l2_")
        )
        run("keys", "limit", account, "--requests-per-minute", str(limit), "--api-keys-file", str(path))
    return keys


@asynccontextmanager
async def replicas(folder: Path) -> AsyncIterator[Replicas]:
    """Run the stores, two replicas and Envoy."""
    async with AsyncExitStack() as stack:
        redis, postgres = stack.enter_context(running_redis(folder)), stack.enter_context(running_postgres())
        keys, usage_url = new_keys(folder / "keys.yaml"), postgres.new_database()
        flags = ("--api-keys-file", str(folder / "keys.yaml"), "--redis-url", redis.url, "--usage-url", usage_url)
        system = Replicas(stack, folder, flags, keys, usage_url)
        for host in HOSTS:
            system.start(host)
        await system.start_envoy()
        yield system


async def outcomes(
    client: Client, calls: int, after: dict[int, Callable[[], None]] | None = None, max_tokens: int = 16
) -> Counter[str]:
    """Make calls, some at a time, and count their results; `after` has actions at a number of finished calls."""
    counts: Counter[str] = Counter()
    places = asyncio.Semaphore(CONCURRENT)

    async def call() -> None:
        async with places:
            try:
                await client.generate(PROMPT, max_tokens=max_tokens, no_cache=True)
                counts["OK"] += 1
            except Llama2Error as error:
                counts[type(error).__name__] += 1
            action = (after or {}).get(counts.total())
            if action is not None:
                action()

    await asyncio.gather(*(call() for _ in range(calls)))
    return counts


async def measure_quota(system: Replicas) -> str:
    """Call both replicas at once, more often than the quota of an account allows."""
    async with (
        system.client("quota", system.addresses[0]) as first,
        system.client("quota", system.addresses[1]) as second,
    ):
        started = time.monotonic()
        counts = await asyncio.gather(*(outcomes(client, QUOTA, max_tokens=1) for client in (first, second)))
        seconds = time.monotonic() - started
    accepted = [count["OK"] for count in counts]
    return (
        f"quota: {sum(accepted)} of {2 * QUOTA} calls accepted with a quota of {QUOTA} ({accepted}), in {seconds:.0f} s"
    )


async def measure_cache(system: Replicas) -> str:
    """Ask one replica, then the other one the same."""
    times, cached = [], []
    for address in system.addresses:
        async with system.client("cache", address) as client:
            await client.usage()  # the connection is open
            started = time.monotonic()
            reply = await client.generate(PROMPT, max_tokens=200, seed=1)
            times.append(time.monotonic() - started)
            cached.append(reply.cached)
    return (
        f"cache: {cached}, {times[0] * 1000:.0f} ms computed, {times[1] * 1000:.1f} ms from the other replica's reply"
    )


async def sent(envoy: Envoy) -> list[int]:
    """Return the number of requests that Envoy has sent to each replica."""
    (cluster,) = (await envoy.http.get(f"http://{envoy.admin}/clusters?format=json")).json()["cluster_statuses"]
    stats = [stat for host in cluster["host_statuses"] for stat in host["stats"] if stat["name"] == "rq_total"]
    return [int(stat.get("value", 0)) for stat in stats]


async def measure_balance(system: Replicas) -> str:
    """Make calls over one connection, some at a time."""
    before = await sent(system.envoy)
    async with system.client("balance") as client:
        counts = await outcomes(client, CALLS)
    shares = [after - earlier for after, earlier in zip(await sent(system.envoy), before, strict=True)]
    return f"balance: {dict(counts)} over one connection, {shares} by replica"


async def measure_end(system: Replicas, account: str, host: str, number: signal.Signals) -> str:
    """End a replica after a quarter of the calls, start it again, and compare the calls with the records of usage."""
    process = system.processes[HOSTS.index(host)]
    async with system.client(account) as client:
        counts = await outcomes(client, CALLS, {CALLS // 4: lambda: os.kill(process.pid, number)})
    code = await asyncio.to_thread(process.wait, 120)
    system.start(host)
    async with asyncio.timeout(120):
        while await system.records(account) < counts["OK"]:
            await asyncio.sleep(0.2)
    return f"{account}: {dict(counts)}, exit code {code}, {await system.records(account)} records of complete replies"


async def main() -> None:
    """Run all measurements, and print a line for each."""
    with tempfile.TemporaryDirectory() as folder:
        async with replicas(Path(folder)) as system:
            for measure in (measure_quota, measure_cache, measure_balance):
                print(await measure(system), flush=True)
            print(await measure_end(system, "drain", HOSTS[0], signal.SIGTERM), flush=True)
            print(await measure_end(system, "kill", HOSTS[1], signal.SIGKILL), flush=True)
    print(f"{os.cpu_count()} processors, load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    asyncio.run(main())
