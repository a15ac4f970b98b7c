"""The response cache, in memory and on a real Redis: keys, sizes and expiry."""

import asyncio
import dataclasses
import gc
import logging
import math
import traceback
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.deadlines import LoopClock
from tests.support.servers.redis_server import RedisServer, running_redis

from llama2_server.engine.sampling import GenerationParams
from llama2_server.generation import response_cache as cache_module
from llama2_server.generation.prompt import Prompt
from llama2_server.generation.response_cache import (
    CacheEntry,
    CacheKey,
    MemoryResponseCache,
    RedisResponseCache,
    ResponseCache,
)
from llama2_server.redis_client import BACKOFF_SECONDS

REPLY = CacheEntry("Once upon a time ✨ there\nwas a fox.", "END_OF_SEQUENCE", 12, 9, 2**64 - 1)
PARAMS = GenerationParams(
    max_tokens=256, temperature=0.7, top_p=0.8, top_k=40, seed=7, repetition_penalty=1.1, stop=("a", "b")
)
OTHER_PARAMS: dict[str, Any] = {
    "max_tokens": 255,
    "temperature": 0.70000001,
    "top_p": 1.0,
    "top_k": 41,
    "seed": 8,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "stop": ("ab",),
}
OTHER_FIELDS: dict[str, Any] = {
    "account_id": "other",
    "model": "other",
    "prompt_ids": (1, 2, 34),
    "raw": True,
    "seeded": False,
}


def make_key(params: GenerationParams = PARAMS, **changes: Any) -> CacheKey:
    fields = {"account_id": "a", "model": "m", "prompt_ids": (1, 2, 3), "raw": False, "seeded": True, **changes}
    prompt = Prompt(fields["prompt_ids"], fields["raw"])
    return CacheKey.of(fields["account_id"], fields["model"], prompt, params, seeded=fields["seeded"])


class Clock:
    """A clock that stands still between changes of `now`."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def redis(tmp_path: Path, patient_stores: None) -> Iterator[RedisServer]:
    """Run a Redis."""
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture
async def redis_cache(redis: RedisServer) -> AsyncIterator[RedisResponseCache]:
    """Return a response cache on a real Redis."""
    cache = RedisResponseCache(redis.url, ttl_seconds=60, max_entry_bytes=100_000)
    yield cache
    await cache.close()


@pytest.fixture(params=["memory", "redis"])
def cache(request: pytest.FixtureRequest) -> ResponseCache:
    """Return a cache with each backend."""
    if request.param == "memory":
        return MemoryResponseCache(max_bytes=100_000, ttl_seconds=60)
    backend: RedisResponseCache = request.getfixturevalue("redis_cache")
    return backend


async def test_cached_reply_is_unchanged(cache: ResponseCache) -> None:
    """A second, equal key returns the same text, byte for byte, with its numbers."""
    assert await cache.get(make_key()) is None
    await cache.put(make_key(), REPLY)
    assert await cache.get(make_key()) == REPLY
    # The servicer counts hits, after the quota: test_metrics.py has them.
    assert (cache.hits, cache.misses) == (0, 1)


async def test_any_difference_is_a_miss(cache: ResponseCache) -> None:
    """Every field of the key counts, above all the account: no account receives another account's reply."""
    await cache.put(make_key(), REPLY)
    for name, value in OTHER_FIELDS.items():
        assert await cache.get(make_key(**{name: value})) is None, name
    for name, value in OTHER_PARAMS.items():
        assert await cache.get(make_key(dataclasses.replace(PARAMS, **{name: value}))) is None, name


def test_key_has_every_parameter() -> None:
    """A new field of GenerationParams is in the key automatically, and these tests must cover it."""
    names = {field.name for field in dataclasses.fields(GenerationParams)}
    assert {name for name, _ in make_key().params} == names == set(OTHER_PARAMS)


def test_unseeded_requests_share_a_key() -> None:
    """A random seed that replaces a missing one is not part of the key."""
    keys = {make_key(dataclasses.replace(PARAMS, seed=seed), seeded=False) for seed in (1, 2)}
    assert len(keys) == 1
    assert make_key(dataclasses.replace(PARAMS, seed=1)) not in keys


async def test_fields_are_delimited(cache: ResponseCache) -> None:
    """No account id makes a key equal to another account's key."""
    await cache.put(make_key(account_id="a", model="b"), REPLY)
    assert await cache.get(make_key(account_id='a", "b', model="")) is None
    assert await cache.get(make_key(account_id="ab", model="")) is None
    assert await cache.get(make_key(account_id="a\n", model="b")) is None


async def test_newer_reply_replaces_the_older(cache: ResponseCache) -> None:
    """A key has one entry."""
    await cache.put(make_key(), REPLY)
    await cache.put(make_key(), dataclasses.replace(REPLY, text="new"))
    found = await cache.get(make_key())
    assert found is not None
    assert found.text == "new"


async def test_memory_is_bounded_in_bytes() -> None:
    """Keys and replies stay below the limit; the least recently used entry is evicted first."""
    cache = MemoryResponseCache(max_bytes=20_000, ttl_seconds=60)
    await cache.put(make_key(), REPLY)
    for index in range(200):
        await cache.put(make_key(prompt_ids=(index,)), REPLY)
        assert await cache.get(make_key()) == REPLY
        assert 0 < cache.bytes_used <= 20_000
    assert await cache.get(make_key(prompt_ids=(199,))) == REPLY
    assert await cache.get(make_key(prompt_ids=(0,))) is None


async def test_counted_bytes_match_the_allocated_memory() -> None:
    """The counted bytes are at least the memory that Python has allocated for the entries, and less than twice that."""
    cache = MemoryResponseCache(max_bytes=10**9, ttl_seconds=60)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for index in range(300):
            ids = tuple(range(1000 * index, 1000 * index + 100))
            await cache.put(
                make_key(prompt_ids=ids, account_id=f"account{index}"), dataclasses.replace(REPLY, text="é" * index)
            )
        gc.collect()
        allocated = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert allocated <= cache.bytes_used <= 2 * allocated


async def test_memory_skips_too_large_entries() -> None:
    """A reply that is larger than the cache is not stored, raises no error and evicts nothing."""
    cache = MemoryResponseCache(max_bytes=10_000, ttl_seconds=60)
    await cache.put(make_key(), REPLY)
    await cache.put(make_key(account_id="long"), dataclasses.replace(REPLY, text="x" * 10_000))
    assert await cache.get(make_key(account_id="long")) is None
    assert await cache.get(make_key()) == REPLY


async def test_memory_is_bounded_in_time() -> None:
    """A reply expires after its time to live, however often it is read; then its bytes are free."""
    clock = Clock()
    cache = MemoryResponseCache(max_bytes=10_000, ttl_seconds=60, clock=clock)
    await cache.put(make_key(), REPLY)
    for clock.now in (30, 59.9):
        assert await cache.get(make_key()) == REPLY
    clock.now = 60
    assert await cache.get(make_key()) is None
    assert cache.bytes_used == 0


async def test_closed_memory_is_empty() -> None:
    """Closing the cache frees its bytes."""
    cache = MemoryResponseCache(max_bytes=10_000, ttl_seconds=60)
    await cache.put(make_key(), REPLY)
    await cache.close()
    assert cache.bytes_used == 0


async def test_redis_is_shared_between_replicas(redis: RedisServer, redis_cache: RedisResponseCache) -> None:
    """A replica finds the replies of another replica."""
    other = RedisResponseCache(redis.url, ttl_seconds=60, max_entry_bytes=100_000)
    await other.put(make_key(), REPLY)
    await other.close()
    assert await redis_cache.get(make_key()) == REPLY


async def test_redis_entry_expires_and_is_bounded(redis: RedisServer, redis_cache: RedisResponseCache) -> None:
    """Redis expires an entry after its time to live; an entry that is too large is not sent."""
    await redis_cache.put(make_key(), REPLY)
    client: Any = redis_cache._redis.client
    (name,) = await client.keys()
    assert 59_000 < await client.pttl(name) <= 60_000
    await redis_cache.put(make_key(account_id="long"), dataclasses.replace(REPLY, text="x" * 100_000))
    assert await client.keys() == [name]


async def test_equal_hashes_mix_no_replies(redis_cache: RedisResponseCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if all hashes were equal, no account would receive another account's reply."""
    monkeypatch.setattr(cache_module, "_digest", lambda canonical: "same")
    await redis_cache.put(make_key(), REPLY)
    assert await redis_cache.get(make_key(account_id="other")) is None
    assert await redis_cache.get(make_key()) == REPLY


@pytest.mark.parametrize("reply", [b"", b"{", b"[]", b"{}", b'"text"', b"\xff", b'{"text": "a", "more": 1}'])
async def test_unknown_entry_is_a_miss(reply: bytes, redis_cache: RedisResponseCache) -> None:
    """An entry of another program or of an older release is a miss, not an error."""
    client: Any = redis_cache._redis.client
    canonical = cache_module._canonical(make_key())
    await client.set(cache_module._redis_key(canonical), canonical + b"\n" + reply)
    assert await redis_cache.get(make_key()) is None
    await redis_cache.put(make_key(), REPLY)
    assert await redis_cache.get(make_key()) == REPLY


async def test_unavailable_redis_is_a_miss(
    redis: RedisServer, redis_cache: RedisResponseCache, clock: LoopClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Reads and writes raise no error, and the log has one record; the cache recovers with Redis."""
    await redis_cache.put(make_key(), REPLY)
    redis.kill()
    for _ in range(3):
        assert await redis_cache.get(make_key()) is None
        await redis_cache.put(make_key(), REPLY)
        clock.advance(BACKOFF_SECONDS)
    assert not redis_cache.store_up
    redis.start()
    await redis_cache.put(make_key(), REPLY)
    assert await redis_cache.get(make_key()) == REPLY
    assert redis_cache.store_up
    assert [record.message.replace(redis.address, "HERE") for record in caplog.records] == [
        "the response cache at HERE does not answer (ConnectionError)",
        "the response cache at HERE answers again",
    ]


async def test_infinite_time_to_live_in_redis(redis: RedisServer) -> None:
    """A time to live may be infinite, or longer than Redis supports."""
    for ttl_seconds in (math.inf, 1e300):
        cache = RedisResponseCache(redis.url, ttl_seconds=ttl_seconds, max_entry_bytes=1000)
        await cache.put(make_key(), REPLY)
        assert await cache.get(make_key()) == REPLY
        await cache.close()


async def test_frozen_redis_costs_one_timeout(
    redis: RedisServer, redis_cache: RedisResponseCache, clock: LoopClock
) -> None:
    """If Redis never answers, one read waits for the timeout; the next reads are misses immediately."""
    await redis_cache.put(make_key(), REPLY)
    redis.freeze()
    clock.stop()
    first = asyncio.create_task(redis_cache.get(make_key()))
    await clock.expire(first)
    assert first.result() is None
    for _ in range(19):  # a read that waits for the timeout would wait forever
        assert await redis_cache.get(make_key()) is None


async def test_password_is_never_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, patient_stores: None) -> None:
    """A wrong password is a miss; no log record and no error contains it, or the password of an invalid URL."""
    caplog.set_level(logging.DEBUG)
    with running_redis(tmp_path, password="s3cret") as redis:  # noqa: S106
        wrong = RedisResponseCache(redis.url.replace("s3cret", "wr0ng"), ttl_seconds=60, max_entry_bytes=1000)
        assert await wrong.get(make_key()) is None
        await wrong.close()
    invalid_url = "redis://:s3cret/wr0ng@127.0.0.1"
    with pytest.raises(ValueError, match="not a valid Redis URL; use redis://") as invalid:
        RedisResponseCache(invalid_url, ttl_seconds=60, max_entry_bytes=1000)
    text = caplog.text + "".join(traceback.format_exception(invalid.value))
    assert "does not answer (AuthenticationError)" in text
    assert "s3cret" not in text
    assert "wr0ng" not in text
