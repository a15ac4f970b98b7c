"""The response cache, in memory and on a real Redis: what is equal, what is kept, and for how long."""

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
    """Stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A real Redis."""
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture
async def redis_cache(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RedisResponseCache]:
    """A response cache on a real Redis, which a busy machine may make slow."""
    monkeypatch.setattr(cache_module, "STORE_TIMEOUT_SECONDS", 10)
    cache = RedisResponseCache(redis.url, ttl_seconds=60, max_entry_bytes=100_000)
    yield cache
    await cache.close()


@pytest.fixture(params=["memory", "redis"])
def cache(request: pytest.FixtureRequest) -> ResponseCache:
    """Each backend in turn."""
    if request.param == "memory":
        return MemoryResponseCache(max_bytes=100_000, ttl_seconds=60)
    backend: RedisResponseCache = request.getfixturevalue("redis_cache")
    return backend


async def test_reply_comes_back_as_it_was(cache: ResponseCache) -> None:
    """Byte for byte the same text, with its numbers; an equal key made anew finds it."""
    assert await cache.get(make_key()) is None
    await cache.put(make_key(), REPLY)
    assert await cache.get(make_key()) == REPLY
    assert (cache.hits, cache.misses) == (1, 1)


async def test_any_difference_is_another_request(cache: ResponseCache) -> None:
    """Each single field of the key counts, the account first: nobody gets another account's reply."""
    await cache.put(make_key(), REPLY)
    for name, value in OTHER_FIELDS.items():
        assert await cache.get(make_key(**{name: value})) is None, name
    for name, value in OTHER_PARAMS.items():
        assert await cache.get(make_key(dataclasses.replace(PARAMS, **{name: value}))) is None, name


def test_no_parameter_is_left_out() -> None:
    """A field that is added to GenerationParams is in the key without a change here, and the tests know it."""
    names = {field.name for field in dataclasses.fields(GenerationParams)}
    assert {name for name, _ in make_key().params} == names == set(OTHER_PARAMS)


def test_unseeded_requests_share_a_key() -> None:
    """The random seed that stood in for an unset one is no part of the request."""
    keys = {make_key(dataclasses.replace(PARAMS, seed=seed), seeded=False) for seed in (1, 2)}
    assert len(keys) == 1
    assert make_key(dataclasses.replace(PARAMS, seed=1)) not in keys


async def test_fields_cannot_run_into_each_other(cache: ResponseCache) -> None:
    """An account that is named like the end of another's key gets nothing of it."""
    await cache.put(make_key(account_id="a", model="b"), REPLY)
    assert await cache.get(make_key(account_id='a", "b', model="")) is None
    assert await cache.get(make_key(account_id="ab", model="")) is None
    assert await cache.get(make_key(account_id="a\n", model="b")) is None


async def test_newer_reply_replaces_the_older(cache: ResponseCache) -> None:
    """One entry a key."""
    await cache.put(make_key(), REPLY)
    await cache.put(make_key(), dataclasses.replace(REPLY, text="new"))
    found = await cache.get(make_key())
    assert found is not None
    assert found.text == "new"


async def test_memory_is_bounded_in_bytes() -> None:
    """However many replies come, keys and replies stay below the limit; the one asked for last stays the longest."""
    cache = MemoryResponseCache(max_bytes=20_000, ttl_seconds=60)
    await cache.put(make_key(), REPLY)
    for index in range(200):
        await cache.put(make_key(prompt_ids=(index,)), REPLY)
        assert await cache.get(make_key()) == REPLY
        assert 0 < cache.bytes_used <= 20_000
    assert await cache.get(make_key(prompt_ids=(199,))) == REPLY
    assert await cache.get(make_key(prompt_ids=(0,))) is None


async def test_counted_bytes_cover_the_memory_taken() -> None:
    """What the cache says it takes is at least what Python allocated for it, and not twice as much."""
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
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert taken <= cache.bytes_used <= 2 * taken


async def test_memory_refuses_what_is_larger_than_itself() -> None:
    """One long reply neither fails nor empties the cache."""
    cache = MemoryResponseCache(max_bytes=10_000, ttl_seconds=60)
    await cache.put(make_key(), REPLY)
    await cache.put(make_key(account_id="long"), dataclasses.replace(REPLY, text="x" * 10_000))
    assert await cache.get(make_key(account_id="long")) is None
    assert await cache.get(make_key()) == REPLY


async def test_memory_is_bounded_in_time() -> None:
    """A reply is there until its time is over, however often it is asked for; then its bytes are free."""
    clock = Clock()
    cache = MemoryResponseCache(max_bytes=10_000, ttl_seconds=60, clock=clock)
    await cache.put(make_key(), REPLY)
    for clock.now in (30, 59.9):
        assert await cache.get(make_key()) == REPLY
    clock.now = 60
    assert await cache.get(make_key()) is None
    assert cache.bytes_used == 0


async def test_closed_memory_is_empty() -> None:
    """Nothing stays behind."""
    cache = MemoryResponseCache(max_bytes=10_000, ttl_seconds=60)
    await cache.put(make_key(), REPLY)
    await cache.close()
    assert cache.bytes_used == 0


async def test_redis_is_shared_between_replicas(redis: RedisServer, redis_cache: RedisResponseCache) -> None:
    """What one replica keeps, another finds."""
    other = RedisResponseCache(redis.url, ttl_seconds=60, max_entry_bytes=100_000)
    await other.put(make_key(), REPLY)
    await other.close()
    assert await redis_cache.get(make_key()) == REPLY


async def test_redis_entry_expires_and_is_bounded(redis: RedisServer, redis_cache: RedisResponseCache) -> None:
    """Redis itself drops an entry at its time; one that is too large is not sent."""
    await redis_cache.put(make_key(), REPLY)
    client: Any = redis_cache._redis.client
    (name,) = await client.keys()
    assert 59_000 < await client.pttl(name) <= 60_000
    await redis_cache.put(make_key(account_id="long"), dataclasses.replace(REPLY, text="x" * 100_000))
    assert await client.keys() == [name]


async def test_equal_hash_is_not_equality(redis_cache: RedisResponseCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were all hashes equal, nobody would get another's reply."""
    monkeypatch.setattr(cache_module, "_digest", lambda canonical: "same")
    await redis_cache.put(make_key(), REPLY)
    assert await redis_cache.get(make_key(account_id="other")) is None
    assert await redis_cache.get(make_key()) == REPLY


@pytest.mark.parametrize("reply", [b"", b"{", b"[]", b"{}", b'"text"', b"\xff", b'{"text": "a", "more": 1}'])
async def test_strange_entry_is_a_miss(reply: bytes, redis_cache: RedisResponseCache) -> None:
    """What somebody else wrote, or an older release, is never an error."""
    client: Any = redis_cache._redis.client
    canonical = cache_module._canonical(make_key())
    await client.set(cache_module._redis_key(canonical), canonical + b"\n" + reply)
    assert await redis_cache.get(make_key()) is None
    await redis_cache.put(make_key(), REPLY)
    assert await redis_cache.get(make_key()) == REPLY


async def test_redis_that_is_gone_is_a_miss(
    redis: RedisServer,
    redis_cache: RedisResponseCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither reading nor writing fails; said once; when Redis is back, so is the cache."""
    await redis_cache.put(make_key(), REPLY)
    redis.kill()
    for _ in range(3):
        assert await redis_cache.get(make_key()) is None
        await redis_cache.put(make_key(), REPLY)
        monkeypatch.setattr(redis_cache._redis, "_paused_until", 0.0)
    assert not redis_cache.store_up
    redis.start()
    await redis_cache.put(make_key(), REPLY)
    assert await redis_cache.get(make_key()) == REPLY
    assert redis_cache.store_up
    assert [record.message.replace(redis.address, "HERE") for record in caplog.records] == [
        "the response cache at HERE does not answer (ConnectionError)",
        "the response cache at HERE answers again",
    ]


async def test_a_time_without_end_is_kept_in_redis(redis: RedisServer) -> None:
    """A response may be kept for ever, or for longer than Redis can count."""
    for ttl_seconds in (math.inf, 1e300):
        cache = RedisResponseCache(redis.url, ttl_seconds=ttl_seconds, max_entry_bytes=1000)
        await cache.put(make_key(), REPLY)
        assert await cache.get(make_key()) == REPLY
        await cache.close()


async def test_frozen_redis_costs_one_timeout_only(
    redis: RedisServer, redis_cache: RedisResponseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis that never answers is left alone after the first time-out."""
    await redis_cache.put(make_key(), REPLY)
    redis.freeze()
    monkeypatch.setattr(redis_cache._redis, "timeout_seconds", 0.2)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for _ in range(20):
        assert await redis_cache.get(make_key()) is None
    assert loop.time() - begun < 2


async def test_password_is_never_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong password is a miss like any other, and stands in no log line; nor does one of a broken URL."""
    caplog.set_level(logging.DEBUG)
    with running_redis(tmp_path, password="s3cret") as redis:  # noqa: S106
        wrong = RedisResponseCache(redis.url.replace("s3cret", "wr0ng"), ttl_seconds=60, max_entry_bytes=1000)
        assert await wrong.get(make_key()) is None
        await wrong.close()
    broken_url = "redis://:s3cret/wr0ng@127.0.0.1"
    with pytest.raises(ValueError, match="not a valid Redis URL; use redis://") as broken:
        RedisResponseCache(broken_url, ttl_seconds=60, max_entry_bytes=1000)
    said = caplog.text + "".join(traceback.format_exception(broken.value))
    assert "does not answer (AuthenticationError)" in said
    assert "s3cret" not in said
    assert "wr0ng" not in said
