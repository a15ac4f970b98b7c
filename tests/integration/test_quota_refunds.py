"""Refunds of quota: in memory in virtual time, and on a real Redis."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.support.servers.redis_server import RedisServer, running_redis
from tests.support.virtual_time import run_virtual

from llama2_server.admission import quota_windows
from llama2_server.admission.quota import Quota, QuotaStatus, QuotaUnit
from llama2_server.card import RequestsPerMinute
from llama2_server.errors import InternalError, QueueFull, QuotaExceeded, ShuttingDown

FIVE = RequestsPerMinute(default=5)


@pytest.fixture
def redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """A real Redis, with time for a busy machine."""
    monkeypatch.setattr(quota_windows, "STORE_TIMEOUT_SECONDS", 10)
    with running_redis(tmp_path) as server:
        yield server


@asynccontextmanager
async def on_redis(redis: RedisServer) -> AsyncIterator[Quota]:
    quota = Quota(FIVE, redis_url=redis.url)
    try:
        yield quota
    finally:
        await quota.close()


def test_refund_restores_the_window() -> None:
    """A refunded request no longer counts, the others keep their times, and a second refund changes nothing."""

    async def main() -> None:
        quota, units = Quota(FIVE), []
        for _ in range(5):
            units.append(await quota.consume("a"))
            await asyncio.sleep(10)
        for _ in range(2):
            await quota.refund(units[3])
            assert await quota.status("a") == QuotaStatus(5, 1, 50)
        await quota.consume("a")
        with pytest.raises(QuotaExceeded) as rejected:
            await quota.consume("a")
        assert rejected.value.retry_after_seconds == 10
        await asyncio.sleep(30)
        await quota.refund(units[0])  # it has left the window
        assert await quota.status("a") == QuotaStatus(5, 3, 30)

    run_virtual(main())


def test_charge_is_refunded_after_some_errors_only() -> None:
    """`charge` gives the request back after an error that refunds quota, and keeps it after any other end."""

    async def main() -> None:
        quota = Quota(FIVE)
        async with quota.charge("a"):
            pass
        for error in (InternalError(), ShuttingDown("during the reply"), asyncio.CancelledError()):
            with pytest.raises(type(error)):
                async with quota.charge("a"):
                    raise error
        assert (await quota.status("a")).remaining == 1
        for _ in range(3):
            with pytest.raises(QueueFull):
                async with quota.charge("a"):
                    raise QueueFull("displaced", 1.0)
        assert (await quota.status("a")).remaining == 1

    run_virtual(main())


async def test_refund_on_redis_is_exact(redis: RedisServer) -> None:
    """Of concurrent refunds each restores one request, also of another replica; a second one restores none."""
    async with on_redis(redis) as quota, on_redis(redis) as other:
        units = [await quota.consume("a") for _ in range(5)]
        await asyncio.gather(*(other.refund(unit) for unit in units[1:4]), quota.refund(units[1]))
        assert (await quota.status("a")).remaining == 3
        results = await asyncio.gather(*(quota.consume("a") for _ in range(20)), return_exceptions=True)
        assert sum(isinstance(result, QuotaUnit) for result in results) == 3


async def test_refund_survives_a_clock_set_back_and_a_lost_redis(redis: RedisServer) -> None:
    """A request that Redis' clock now puts in the future is given back; without Redis, the refund raises no error."""
    async with on_redis(redis) as quota:
        await quota.consume("a")
        assert quota._shared is not None
        client = quota._shared._redis.client
        seconds, microseconds = await client.time()
        future = (seconds + 3600) * 1_000_000 + microseconds
        await client.lpush("llama2:quota::a", future)
        await quota.refund(QuotaUnit("a", None, future))
        assert (await quota.status("a")).remaining == 4
        unit = await quota.consume("a")
        redis.kill()
        await quota.refund(unit)
        assert quota.store_errors == 1
