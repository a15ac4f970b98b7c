"""Requests per minute: in memory in virtual time, and on a real Redis."""

import asyncio
import logging
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.servers.redis_server import RedisServer, running_redis
from tests.support.virtual_time import run_virtual

from llama2_server.admission import quota as quota_module
from llama2_server.admission.quota import Quota, QuotaStatus
from llama2_server.card import RequestsPerMinute
from llama2_server.errors import QuotaExceeded, QuotaStoreUnavailable
from llama2_server.redis_client import RedisClient

FIVE = RequestsPerMinute(default=5, accounts={"32118455": 60, "small": 1})
HOURS = 3600.0
JUMPS = [pytest.param(7 * HOURS, id="forward"), pytest.param(-7 * HOURS, id="back")]


@pytest.fixture
def redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """A real Redis, which a busy machine may make slow."""
    monkeypatch.setattr(quota_module, "STORE_TIMEOUT_SECONDS", 10)
    with running_redis(tmp_path) as server:
        yield server


@asynccontextmanager
async def on_redis(
    redis: RedisServer, window_seconds: float = 60.0, fallback: Literal["reject", "local"] = "reject"
) -> AsyncIterator[Quota]:
    quota = Quota(FIVE, redis_url=redis.url, fallback=fallback, window_seconds=window_seconds)
    try:
        yield quota
    finally:
        await quota.close()


async def admitted(quota: Quota, account: str, attempts: int) -> int:
    """How many of so many concurrent attempts were let in."""
    results = await asyncio.gather(*(quota.consume(account) for _ in range(attempts)), return_exceptions=True)
    refused = [result for result in results if isinstance(result, BaseException)]
    assert all(isinstance(error, QuotaExceeded) for error in refused), refused
    return attempts - len(refused)


async def refusal(quota: Quota, account: str = "a") -> float:
    """The time after which a refused request is to be tried again."""
    with pytest.raises(QuotaExceeded) as refused:
        await quota.consume(account)
    assert refused.value.retry_after_seconds is not None
    return refused.value.retry_after_seconds


async def rests_no_more(quota: Quota, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a store that failed is asked again at once."""
    monkeypatch.setattr(link_of(quota), "_paused_until", 0.0)


def test_sixth_request_is_refused_until_the_promised_moment() -> None:
    """The card's 5: the sixth is refused with the exact time, a microsecond sooner is too soon, then it is in."""

    async def main() -> None:
        quota = Quota(FIVE)
        for pause in (0, 1, 1, 1, 1):
            await asyncio.sleep(pause)
            await quota.consume("a")
        assert await refusal(quota) == 56
        await asyncio.sleep(56 - 1e-6)
        assert await refusal(quota) == 1e-6
        await asyncio.sleep(1e-6)
        await quota.consume("a")
        assert await refusal(quota) == 1

    run_virtual(main())


def test_refusals_cost_nothing() -> None:
    """However often a refused caller tries, the promised moment stays."""

    async def main() -> None:
        quota = Quota(FIVE)
        assert await admitted(quota, "a", 5) == 5
        for _ in range(30):
            await refusal(quota)
            await asyncio.sleep(1)
        assert await refusal(quota) == 30

    run_virtual(main())


def test_accounts_have_their_own_limits() -> None:
    """The card's override by account id, numeric ones too, and the default for the others; none touches another."""

    async def main() -> None:
        quota = Quota(RequestsPerMinute.model_validate({"default": 5, "accounts": {32118455: 60}}))
        assert await admitted(quota, "a", 100) == 5
        assert await admitted(quota, "32118455", 100) == 60
        assert await admitted(quota, "b", 100) == 5

    run_virtual(main())


def test_refusal_names_account_and_limit() -> None:
    """The caller learns whose limit it is, and how large."""

    async def main() -> None:
        quota = Quota(FIVE)
        await quota.consume("small")
        with pytest.raises(QuotaExceeded, match=r"^account small has used up its quota of 1 requests per minute$"):
            await quota.consume("small")

    run_virtual(main())


def test_status_counts_nothing() -> None:
    """What is left, and when all of it is back."""

    async def main() -> None:
        quota = Quota(FIVE)
        assert await quota.status("a") == QuotaStatus(5, 5, 0)
        await quota.consume("a")
        await asyncio.sleep(10)
        await quota.consume("a")
        await asyncio.sleep(20)
        for _ in range(10):
            assert await quota.status("a") == QuotaStatus(5, 3, 40)
        assert (quota.store_up, quota.store_errors) == (True, 0)

    run_virtual(main())


@settings(max_examples=50, deadline=None)
@given(
    pauses=st.lists(st.floats(0, 40), max_size=60),
    limit=st.integers(1, 7),
)
def test_no_window_holds_more_than_the_limit(pauses: list[float], limit: int) -> None:
    """Whatever the arrivals: no 60 seconds hold more than the limit, and who waits as told is let in."""

    async def main() -> None:
        quota, let_in = Quota(RequestsPerMinute(default=limit)), []
        for pause in pauses:
            await asyncio.sleep(pause)
            try:
                await quota.consume("a")
            except QuotaExceeded as refused:
                await asyncio.sleep(refused.retry_after_seconds or 0)
                await quota.consume("a")
            let_in.append(asyncio.get_running_loop().time())
        for first, last in zip(let_in, let_in[limit:], strict=False):
            assert last - first > 60 - 2e-6  # counted in whole microseconds

    run_virtual(main())


@pytest.mark.parametrize("jump", JUMPS)
def test_wall_clock_jump_changes_nothing(jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours forward or back on the wall clock neither free nor block a request."""

    async def main() -> None:
        quota = Quota(FIVE)
        assert await admitted(quota, "a", 100) == 5
        set_wall_clock(monkeypatch, jump)
        assert await refusal(quota) == 60
        await asyncio.sleep(60)
        assert await admitted(quota, "a", 100) == 5

    run_virtual(main())


async def test_racers_on_redis_get_exactly_the_budget(redis: RedisServer) -> None:
    """100 racers on a budget of 5: exactly 5; other accounts have theirs."""
    async with on_redis(redis) as quota:
        assert await admitted(quota, "a", 100) == 5
        assert await admitted(quota, "32118455", 100) == 60
        assert await quota.status("b") == QuotaStatus(5, 5, 0)
        assert (quota.store_up, quota.store_errors) == (True, 0)


RACE = """
import asyncio, sys
from llama2_server.admission import quota as quota_module
from llama2_server.card import RequestsPerMinute
from llama2_server.errors import QuotaExceeded
from llama2_server.admission.quota import Quota

quota_module.STORE_TIMEOUT_SECONDS = 10

async def main():
    quota = Quota(RequestsPerMinute(default=5), redis_url=sys.argv[1])
    await quota.status("a")
    print("ready", flush=True)
    input()
    results = await asyncio.gather(*(quota.consume("a") for _ in range(50)), return_exceptions=True)
    assert all(result is None or isinstance(result, QuotaExceeded) for result in results), results
    print(results.count(None))
    await quota.close()

asyncio.run(main())
"""


async def test_racers_of_two_processes_get_exactly_the_budget(redis: RedisServer) -> None:
    """Two replicas, 50 racers in each, started by one shot: 5 in all."""
    pipe = asyncio.subprocess.PIPE
    replicas = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", RACE, redis.url, stdin=pipe, stdout=pipe)
        for _ in range(2)
    ]
    for replica in replicas:
        assert replica.stdout is not None
        assert await replica.stdout.readline() == b"ready\n"
    outputs = await asyncio.gather(*(replica.communicate(b"\n") for replica in replicas))
    assert sum(int(output) for output, _ in outputs) == 5


async def test_promise_is_kept_on_redis(redis: RedisServer) -> None:
    """A request that waits as RetryInfo says is let in, and one just before is not."""
    async with on_redis(redis, window_seconds=1.5) as quota:
        await quota.consume("a")
        await asyncio.sleep(0.2)
        assert await admitted(quota, "a", 5) == 4
        await asyncio.sleep(await refusal(quota) - 0.5)
        wait = await refusal(quota)
        assert 0 < wait <= 0.5
        await asyncio.sleep(wait)
        assert await admitted(quota, "a", 5) == 1


async def test_windows_on_redis_expire(redis: RedisServer) -> None:
    """An account that calls no more leaves nothing in Redis, and a look leaves nothing at all."""
    async with on_redis(redis, window_seconds=5) as quota:
        await quota.status("b")
        assert await redis_client(quota).dbsize() == 0
        await quota.consume("a")
        assert 0 < await redis_client(quota).pttl("llama2:quota::a") <= 5000


@pytest.mark.parametrize("jump", JUMPS)
async def test_wall_clock_jump_of_a_replica_changes_nothing_on_redis(
    jump: float, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas whose wall clocks differ by hours share one window."""
    async with on_redis(redis) as quota, on_redis(redis) as other:
        assert await admitted(quota, "a", 3) == 3
        set_wall_clock(monkeypatch, jump)
        assert await admitted(other, "a", 100) == 2
        assert 30 < await refusal(other) <= 60  # a busy machine may take its time


async def test_redis_clock_set_back_blocks_for_one_window_at_most(redis: RedisServer) -> None:
    """Times that lie in Redis' future count as made now; the budget is not exceeded, and nobody waits for hours."""
    async with on_redis(redis, window_seconds=1) as quota:
        client = redis_client(quota)
        seconds, microseconds = await client.time()
        future = (seconds + 3600) * 1_000_000 + microseconds
        await client.lpush("llama2:quota::a", *(future + index for index in range(4)))
        assert await admitted(quota, "a", 100) == 1
        wait = await refusal(quota)
        assert 0 < wait <= 1
        await asyncio.sleep(wait)
        await quota.consume("a")


async def test_lowered_limit_holds_at_once(redis: RedisServer) -> None:
    """After a restart with a smaller limit, the time told is when so many have left the window."""
    async with on_redis(redis, window_seconds=1) as quota:
        await quota.consume("a")
        await asyncio.sleep(0.2)
        assert await admitted(quota, "a", 5) == 4
        quota._limits = RequestsPerMinute(default=2)
        status = await quota.status("a")
        assert (status.limit, status.remaining) == (2, 0)
        await asyncio.sleep(await refusal(quota))
        await quota.consume("a")


async def test_models_do_not_share_their_limits(redis: RedisServer) -> None:
    """Services of different models count apart in one Redis."""
    quotas = [Quota(FIVE, redis_url=redis.url, model=model) for model in ("one", "two")]
    for quota in quotas:
        assert await admitted(quota, "a", 20) == 5
        await quota.close()


async def test_without_redis_requests_are_refused(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The default policy: UNAVAILABLE and retry, counted and logged once; when Redis is back, so is the service."""
    async with on_redis(redis) as quota:
        await quota.consume("a")
        redis.kill()
        for _ in range(3):
            with pytest.raises(QuotaStoreUnavailable):
                await quota.consume("a")
            await rests_no_more(quota, monkeypatch)
        assert (quota.store_up, quota.store_errors) == (False, 3)
        redis.start()
        assert await admitted(quota, "a", 100) == 5
        assert quota.store_up
    assert [record.message.replace(redis.address, "HERE") for record in caplog.records] == [
        "the quota store at HERE does not answer (ConnectionError)",
        "the quota store at HERE answers again",
    ]


async def test_recovery_needs_no_more_than_the_told_wait(redis: RedisServer) -> None:
    """Who waits for the time that QuotaStoreUnavailable tells is let in, once Redis is back."""
    async with on_redis(redis) as quota:
        redis.kill()
        with pytest.raises(QuotaStoreUnavailable) as refused:
            await quota.consume("a")
        redis.start()
        await asyncio.sleep(refused.value.retry_after_seconds or 0)
        await quota.consume("a")


async def test_restarted_redis_goes_unnoticed(redis: RedisServer) -> None:
    """Connections that died between two calls cost no call."""
    async with on_redis(redis) as quota:
        assert await admitted(quota, "a", 100) == 5
        await asyncio.to_thread(redis.kill)  # so that the event loop hears of it, as it would in a server
        redis.start()
        assert await admitted(quota, "a", 100) == 5
        assert quota.store_errors == 0


async def test_without_redis_a_replica_holds_the_limits_by_itself(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other policy: what this replica let in before counts, and the limit holds; then Redis counts again."""
    async with on_redis(redis, fallback="local") as quota:
        assert await admitted(quota, "a", 3) == 3
        redis.kill()
        assert await admitted(quota, "a", 100) == 2
        assert (await quota.status("a")).remaining == 0
        assert not quota.store_up
        redis.start()
        await rests_no_more(quota, monkeypatch)
        assert await admitted(quota, "a", 100) == 5
        assert quota.store_up


async def test_frozen_redis_costs_one_timeout_only(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis that takes the call and never answers is given up after the time-out, then left alone for a while."""
    async with on_redis(redis) as quota:
        await quota.consume("a")
        redis.freeze()
        monkeypatch.setattr(link_of(quota), "timeout_seconds", 0.2)
        begun = time.monotonic()
        for _ in range(20):
            with pytest.raises(QuotaStoreUnavailable):
                await quota.consume("a")
        assert time.monotonic() - begun < 2
        redis.thaw()
        monkeypatch.setattr(link_of(quota), "timeout_seconds", 10)
        await rests_no_more(quota, monkeypatch)
        await quota.consume("a")


async def test_password_is_never_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a log line nor an error's text holds the password, be it right, wrong, or in a broken URL."""
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
        with pytest.raises(QuotaStoreUnavailable) as refused:
            await wrong.consume("a")
        await wrong.close()
    broken_url = "redis://:s3cret/wr0ng@127.0.0.1"
    with pytest.raises(ValueError, match="not a valid Redis URL; use redis://") as broken:
        Quota(FIVE, redis_url=broken_url)
    said = caplog.text + "".join(traceback.format_exception(refused.value) + traceback.format_exception(broken.value))
    assert "does not answer (AuthenticationError)" in said
    assert "s3cret" not in said
    assert "wr0ng" not in said


def link_of(quota: Quota) -> RedisClient:
    """The quota's own connection to Redis."""
    assert quota._shared is not None
    return quota._shared._redis


def redis_client(quota: Quota) -> Any:
    """The Redis client behind it."""
    return link_of(quota).client


def set_wall_clock(monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    real: Callable[[], float] = time.time
    real_ns: Callable[[], int] = time.time_ns
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + round(jump * 1e9))
