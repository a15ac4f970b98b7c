"""GetUsage over many records."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import grpc.aio
from tests.reliability.chaos.kills import fast_card
from tests.reliability.chaos.scene import Scene, percentile
from tests.reliability.chaos.traffic import traffic

from llama2.v1 import account_pb2, account_pb2_grpc
from llama2_server.usage.local import statements
from llama2_server.usage.local.database import Database
from llama2_server.usage.local.local_ledger import file_of
from llama2_server.usage.records import UsageRecord

RECORDS = 300_000
DAYS = 30
READS = 200
MAX_SECONDS = 0.02


async def play_usage(scene: Scene) -> None:
    """GetUsage over 300,000 records: it answers within 20 ms, and other calls are served at the same time."""
    data = scene.folder / "data"
    data.mkdir()
    await asyncio.to_thread(_write_records, file_of(data))
    server = await scene.start(data, "--card", str(fast_card(scene.folder)), "--weights", "demo")
    alone: list[float] = []
    busy: list[float] = []
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = account_pb2_grpc.AccountServiceStub(channel)

        async def read(seconds: list[float]) -> None:
            started_at = time.monotonic()
            usage = await stub.GetUsage(account_pb2.GetUsageRequest())
            seconds.append(time.monotonic() - started_at)
            counted = sum(day.requests for day in usage.days)
            scene.check(counted >= RECORDS, f"GetUsage counted {counted} of {RECORDS} requests")

        for _ in range(READS):
            await read(alone)
        async with traffic(server.address, scene.draw) as running:
            await running.completed(50)
            before = running.latencies[:]
            for _ in range(READS):
                await read(busy)
            await running.completed(50)
            during = running.latencies[len(before) :]
    await scene.stop(server)
    scene.check_statuses(running.history)
    median = percentile(alone, 0.5)
    scene.check(
        median <= MAX_SECONDS, f"GetUsage takes {median * 1000:.0f} ms, the limit is {MAX_SECONDS * 1000:.0f} ms"
    )
    figures = {
        "GetUsage median": median,
        "p99": percentile(alone, 0.99),
        "with traffic": percentile(busy, 0.5),
        "reply without GetUsage": percentile(before, 0.5),
        "with": percentile(during, 0.5),
    }
    scene.figures.append(", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in figures.items()))


def _write_records(path: Any) -> None:
    database = Database.open(path)
    now = datetime.now(UTC)
    with database.transaction() as connection:
        for number in range(RECORDS):
            at = now - timedelta(days=number % DAYS)
            price = Decimal("11.016")
            record = UsageRecord(f"{number}", "anonymous", "model", at, at, 10, 20, False, price, "MAX_TOKENS")
            statements.upsert(connection, record)
    database.close()
