"""Requests per minute on a real Redis."""

import asyncio
import logging
import random
import sys
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.support.deadlines import LoopClock
from tests.support.quotas import CLOCK_CHANGES, FIVE, change_wall_clock, count_allowed, retry_after
from tests.support.servers.redis_server import RedisServer, running_redis

from llama2_server.admission import quota_windows
from llama2_server.admission.quota import Quota, QuotaStatus
from llama2_server.card import RequestsPerMinute
from llama2_server.errors import QuotaStoreUnavailable
from llama2_server.redis_client import BACKOFF_SECONDS

MIDNIGHT = 1_800_000_000.0


@pytest.fixture
def redis(tmp_path: Path, patient_stores: None) -> Iterator[RedisServer]:
    """Run a Redis."""
    with running_redis(tmp_path) as server:
        yield server


class RedisClock:
    """The clock of the quota's script in Redis, which stands still between calls of `set`."""

    SCRIPT_LINE = "redis.call('TIME')"
    REPLACEMENT = "redis.call('LRANGE', 'clock', 0, -1)"

    async def set(self, quota: Quota, seconds: float) -> None:
        """Set the clock to this number of seconds after midnight."""
        microseconds = round((MIDNIGHT + seconds) * 1e6)
        client = redis_client(quota)
        await client.delete("clock")
        await client.rpush("clock", microseconds // 1_000_000, microseconds % 1_000_000)


@pytest.fixture
def redis_clock(monkeypatch: pytest.MonkeyPatch) -> RedisClock:
    """Return the clock of Redis, for quotas that the test creates."""
    script = quota_windows._WINDOW_SCRIPT
    assert RedisClock.SCRIPT_LINE in script
    monkeypatch.setattr(quota_windows, "_WINDOW_SCRIPT", script.replace(RedisClock.SCRIPT_LINE, RedisClock.REPLACEMENT))
    return RedisClock()


@asynccontextmanager
async def on_redis(redis: RedisServer, fallback: Literal["reject", "local"] = "reject") -> AsyncIterator[Quota]:
    quota = Quota(FIVE, redis_url=redis.url, fallback=fallback)
    try:
        yield quota
    finally:
        await quota.close()


def redis_client(quota: Quota) -> Any:
    """Return the Redis client of the quota."""
    assert quota._shared is not None
    return quota._shared._redis.client


async def test_concurrent_requests_get_exactly_the_quota(redis: RedisServer) -> None:
    """100 concurrent requests with a quota of 5: exactly 5 are allowed; other accounts have their own quota."""
    async with on_redis(redis) as quota:
        assert await count_allowed(quota, "a", 100) == 5
        assert await count_allowed(quota, "32118455", 100) == 60
        assert await quota.status("b") == QuotaStatus(5, 5, 0)
        assert (quota.store_up, quota.store_errors) == (True, 0)


REPLICA = """
import asyncio, sys
from llama2_server.admission import quota_windows
from llama2_server.card import RequestsPerMinute
from llama2_server.errors import QuotaExceeded
from llama2_server.admission.quota import Quota, QuotaUnit

quota_windows.STORE_TIMEOUT_SECONDS = 30

async def main():
    quota = Quota(RequestsPerMinute(default=5), redis_url=sys.argv[1])
    await quota.status("a")
    print("ready", flush=True)
    input()
    results = await asyncio.gather(*(quota.consume("a") for _ in range(50)), return_exceptions=True)
    assert all(isinstance(result, (QuotaUnit, QuotaExceeded)) for result in results), results
    print(sum(isinstance(result, QuotaUnit) for result in results))
    await quota.close()

asyncio.run(main())
"""


async def test_two_processes_share_the_quota(redis: RedisServer) -> None:
    """Two replicas with 50 concurrent requests each allow 5 in total."""
    pipe = asyncio.subprocess.PIPE
    replicas = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", REPLICA, redis.url, stdin=pipe, stdout=pipe)
        for _ in range(2)
    ]
    for replica in replicas:
        assert replica.stdout is not None
        assert await replica.stdout.readline() == b"ready\n"
    outputs = await asyncio.gather(*(replica.communicate(b"\n") for replica in replicas))
    assert sum(int(output) for output, _ in outputs) == 5


async def test_retry_time_is_exact(redis: RedisServer, redis_clock: RedisClock) -> None:
    """A request that waits as long as RetryInfo says is allowed; a microsecond earlier, it is rejected."""
    async with on_redis(redis) as quota:
        await redis_clock.set(quota, 0)
        await quota.consume("a")
        await redis_clock.set(quota, 0.2)
        assert await count_allowed(quota, "a", 5) == 4
        assert await retry_after(quota) == 59.8
        await redis_clock.set(quota, 60 - 1e-6)
        assert await retry_after(quota) == 1e-6
        await redis_clock.set(quota, 60)
        assert await count_allowed(quota, "a", 5) == 1


async def test_units_are_kept_for_expected_calls(redis: RedisServer, redis_clock: RedisClock) -> None:
    """Redis keeps as many requests for expected calls as the quota in memory."""
    draw, outcomes = random.Random(1), Counter[bool]()
    loop = asyncio.get_running_loop()
    async with on_redis(redis) as quota:
        for number in range(100):
            account = f"a{number}"
            for at in (consumed := sorted(draw.choices(range(60), k=draw.randint(1, 5)))):
                await redis_clock.set(quota, 60 * number + at)
                await quota.consume(account)
            expected = sorted(draw.choices(range(60), k=draw.randint(0, 6)))
            await redis_clock.set(quota, 60 * number + 60)
            quota.expected_calls = lambda _, delays=expected: [loop.time() + delay + 0.5 for delay in delays]  # type: ignore[misc]
            in_window = [at * 10**6 for at in consumed if at > 0]
            free = quota_windows.free_requests(5, in_window, [delay * 10**6 + 500_000 for delay in expected])
            assert await count_allowed(quota, account, 1) == int(free > 0), (consumed, expected)
            outcomes[free > 0] += 1
            quota.expected_calls = lambda _: ()
    assert min(outcomes[True], outcomes[False]) > 20, outcomes


async def test_windows_expire(redis: RedisServer) -> None:
    """The key of an account expires with its window, and reading the status creates no key."""
    async with on_redis(redis) as quota:
        await quota.status("b")
        assert await redis_client(quota).dbsize() == 0
        await quota.consume("a")
        assert 0 < await redis_client(quota).pttl("llama2:quota::a") <= 60_000


@pytest.mark.parametrize("seconds", CLOCK_CHANGES)
async def test_wall_clock_change_of_a_replica_has_no_effect(
    seconds: float, redis: RedisServer, redis_clock: RedisClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas whose wall clocks differ by hours share one window."""
    async with on_redis(redis) as quota, on_redis(redis) as other:
        await redis_clock.set(quota, 0)
        assert await count_allowed(quota, "a", 3) == 3
        change_wall_clock(monkeypatch, seconds)
        assert await count_allowed(other, "a", 100) == 2
        assert await retry_after(other) == 60


async def test_redis_clock_set_back_blocks_at_most_one_window(redis: RedisServer, redis_clock: RedisClock) -> None:
    """Times in the future of Redis count as now: the quota is not exceeded, and no client waits for hours."""
    async with on_redis(redis) as quota:
        await redis_clock.set(quota, 0)
        future = round((MIDNIGHT + 3600) * 1e6)
        await redis_client(quota).lpush("llama2:quota::a", *(future + index for index in range(4)))
        assert await count_allowed(quota, "a", 100) == 1
        assert await retry_after(quota) == 60
        await redis_clock.set(quota, 60)
        await quota.consume("a")


async def test_lowered_limit_applies_immediately(redis: RedisServer, redis_clock: RedisClock) -> None:
    """After a restart with a lower limit, the retry time is when enough requests have left the window."""
    async with on_redis(redis) as quota:
        await redis_clock.set(quota, 0)
        await quota.consume("a")
        await redis_clock.set(quota, 0.2)
        assert await count_allowed(quota, "a", 5) == 4
        quota._limits = RequestsPerMinute(default=2)
        status = await quota.status("a")
        assert (status.limit, status.remaining) == (2, 0)
        assert await retry_after(quota) == 60
        await redis_clock.set(quota, 60.2)
        await quota.consume("a")


async def test_models_have_separate_windows(redis: RedisServer) -> None:
    """Services of different models count separately in one Redis."""
    quotas = [Quota(FIVE, redis_url=redis.url, model=model) for model in ("one", "two")]
    for quota in quotas:
        assert await count_allowed(quota, "a", 20) == 5
        await quota.close()


async def test_without_redis_requests_are_rejected(
    redis: RedisServer, clock: LoopClock, caplog: pytest.LogCaptureFixture
) -> None:
    """By default, requests are UNAVAILABLE and counted, and the log has one record; the quota recovers with Redis."""
    async with on_redis(redis) as quota:
        await quota.consume("a")
        redis.kill()
        for _ in range(3):
            with pytest.raises(QuotaStoreUnavailable):
                await quota.consume("a")
            clock.advance(BACKOFF_SECONDS)
        assert (quota.store_up, quota.store_errors) == (False, 3)
        redis.start()
        assert await count_allowed(quota, "a", 100) == 5
        assert quota.store_up
    assert [record.message.replace(redis.address, "HERE") for record in caplog.records] == [
        "the quota store at HERE does not answer (ConnectionError)",
        "the quota store at HERE answers again",
    ]


async def test_recovery_after_the_retry_time(redis: RedisServer, clock: LoopClock) -> None:
    """Once Redis is back, a client that waits as long as QuotaStoreUnavailable says is allowed."""
    async with on_redis(redis) as quota:
        redis.kill()
        with pytest.raises(QuotaStoreUnavailable) as rejected:
            await quota.consume("a")
        redis.start()
        clock.advance(rejected.value.retry_after_seconds or 0)
        await quota.consume("a")


async def test_restarted_redis_fails_no_request(redis: RedisServer) -> None:
    """Connections that are closed between two requests fail no request."""
    async with on_redis(redis) as quota:
        assert await count_allowed(quota, "a", 100) == 5
        await asyncio.to_thread(redis.kill)  # the event loop runs, so that it detects the closed connections
        redis.start()
        assert await count_allowed(quota, "a", 100) == 5
        assert quota.store_errors == 0


async def test_local_fallback_keeps_the_limits(redis: RedisServer, clock: LoopClock) -> None:
    """With the local fallback, earlier requests of this replica count, and the limit holds; then Redis counts again."""
    async with on_redis(redis, fallback="local") as quota:
        assert await count_allowed(quota, "a", 3) == 3
        redis.kill()
        assert await count_allowed(quota, "a", 100) == 2
        assert (await quota.status("a")).remaining == 0
        assert not quota.store_up
        redis.start()
        clock.advance(BACKOFF_SECONDS)
        assert await count_allowed(quota, "a", 100) == 5
        assert quota.store_up


async def test_frozen_redis_costs_one_timeout(redis: RedisServer, clock: LoopClock) -> None:
    """If Redis never answers, one request waits for the timeout; the next requests are rejected immediately."""
    async with on_redis(redis) as quota:
        await quota.consume("a")
        redis.freeze()
        clock.stop()
        first = asyncio.create_task(quota.consume("a"))
        await clock.expire(first)
        assert isinstance(first.exception(), QuotaStoreUnavailable)
        for _ in range(19):  # a request that waits for the timeout would wait forever
            with pytest.raises(QuotaStoreUnavailable):
                await quota.consume("a")
        redis.thaw()
        clock.advance(BACKOFF_SECONDS)
        await quota.consume("a")


async def test_password_is_never_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, patient_stores: None) -> None:
    """No log record and no error contains the password, whether it is right, wrong or in an invalid URL."""
    caplog.set_level(logging.DEBUG)
    with running_redis(tmp_path, password="s3cret") as redis:  # noqa: S106
        async with on_redis(redis) as quota:
            await quota.consume("a")
            redis.kill()
            with pytest.raises(QuotaStoreUnavailable):
                await quota.consume("a")
            redis.start()
        wrong_url = redis.url.replace("s3cret", "wr0ng")
        wrong = Quota(FIVE, redis_url=wrong_url)
        with pytest.raises(QuotaStoreUnavailable) as rejected:
            await wrong.consume("a")
        await wrong.close()
    invalid_url = "redis://:s3cret/wr0ng@127.0.0.1"
    with pytest.raises(ValueError, match="not a valid Redis URL; use redis://") as invalid:
        Quota(FIVE, redis_url=invalid_url)
    errors = traceback.format_exception(rejected.value) + traceback.format_exception(invalid.value)
    text = caplog.text + "".join(errors)
    assert "does not answer (AuthenticationError)" in text
    assert "s3cret" not in text
    assert "wr0ng" not in text
