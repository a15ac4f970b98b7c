"""The response cache: complete replies per account, by everything that can change them."""

import dataclasses
import hashlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from cachetools import TTLCache
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llama2_server.engine.sampling import GenerationParams
from llama2_server.generation.prompt import Prompt
from llama2_server.redis_client import RedisClient, RedisUnavailable

# Memory of the cache's tables per entry, measured and rounded up.
ENTRY_OVERHEAD_BYTES = 600
ALLOCATION_BYTES = 16  # Python allocates memory in multiples of this
# With a slower answer, a cached reply would take longer than a generated one.
STORE_TIMEOUT_SECONDS = 0.25
# Thirty years; Redis rejects a time to live that it cannot add to its clock.
MAX_TTL_SECONDS = 1e9

Value = str | int | float | None | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Everything that can change a reply; keys of two accounts are never equal."""

    account_id: str
    model: str
    """The card's name and the fingerprint: replicas with other weights or kernels share the store, and have other
    texts for a seed."""
    prompt_ids: tuple[int, ...]
    raw: bool
    params: tuple[tuple[str, Value], ...]
    """Every generation parameter by name; the seed is None if the request leaves it to the server."""

    @classmethod
    def of(cls, account_id: str, model: str, prompt: Prompt, params: GenerationParams, *, seeded: bool) -> "CacheKey":
        """Return the key of a request. It has every field of `params`, fields that are added later included."""
        values = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
        if not seeded:
            values["seed"] = None
        return cls(account_id, model, prompt.token_ids, prompt.raw, tuple(sorted(values.items())))

    @property
    def seeded(self) -> bool:
        """Whether the request has a seed."""
        return dict(self.params)["seed"] is not None

    @property
    def digest(self) -> str:
        """SHA-256 of the key."""
        return _digest(_canonical(self))


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A complete reply, with the tokens that it took to generate."""

    text: str
    finish_reason: str
    input_tokens: int
    output_tokens: int
    seed: int


class ResponseCache(Protocol):
    """A store of complete replies; a lost entry is never an error."""

    hits: int
    """Requests answered from the cache, counted by the caller of `get`: the quota can still reject a request."""
    misses: int

    @property
    def bytes_used(self) -> int:
        """Memory of this process that the cache uses."""

    async def get(self, key: CacheKey) -> CacheEntry | None:
        """Return the reply of an equal request; None counts as a miss."""

    async def peek(self, key: CacheKey) -> CacheEntry | None:
        """Return the reply of an equal request that was counted already, or None."""

    async def put(self, key: CacheKey, entry: CacheEntry) -> None:
        """Store a complete reply, if it fits."""

    async def close(self) -> None:
        """Disconnect from the store."""


class ResponseCacheCollector(Collector):
    """Metrics of the response cache; all are 0 without a cache."""

    def __init__(self, cache: ResponseCache | None) -> None:
        self._cache = cache

    def collect(self) -> Iterator[Metric]:
        """Yield the cache's metrics, on the scrape thread."""
        cache = self._cache
        hits, misses, size = (cache.hits, cache.misses, cache.bytes_used) if cache is not None else (0, 0, 0)
        answered = "Requests answered from the response cache."
        yield CounterMetricFamily("llama2_response_cache_hits", answered, hits)
        yield CounterMetricFamily("llama2_response_cache_misses", "Response cache misses.", misses)
        memory = "Memory of the response cache in this process; 0 if the cache is in Redis or off."
        yield GaugeMetricFamily("llama2_response_cache_bytes", memory, size)


class MemoryResponseCache:
    """A cache in this process of at most `max_bytes`, keys included; it evicts the least recently used entry."""

    def __init__(self, *, max_bytes: int, ttl_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        # The scrape thread reads `bytes_used`.
        self._lock = threading.Lock()
        self._entries: TTLCache[CacheKey, _SizedEntry] = TTLCache(
            max_bytes, ttl_seconds, clock, lambda sized: sized.size
        )
        self.hits = 0
        self.misses = 0

    @property
    def bytes_used(self) -> int:
        """Memory of keys, replies and tables."""
        with self._lock:
            return int(self._entries.currsize)

    async def get(self, key: CacheKey) -> CacheEntry | None:
        """Return the reply of an equal request; None counts as a miss."""
        entry = await self.peek(key)
        if entry is None:
            self.misses += 1
        return entry

    async def peek(self, key: CacheKey) -> CacheEntry | None:
        """Return the reply of an equal request that was counted already, or None."""
        with self._lock:
            sized = self._entries.get(key)
        return None if sized is None else sized.entry

    async def put(self, key: CacheKey, entry: CacheEntry) -> None:
        """Store a complete reply, unless it is larger than the whole cache."""
        size = ENTRY_OVERHEAD_BYTES + _size_of(key) + _size_of(entry)
        if size <= self._max_bytes:
            with self._lock:
                self._entries[key] = _SizedEntry(entry, size)

    async def close(self) -> None:
        """Remove every entry."""
        with self._lock:
            self._entries.clear()


class RedisResponseCache:
    """A cache in one Redis for all replicas, `ttl_seconds` per entry. An unavailable Redis is a cache miss; the cache
    reconnects by itself.

    The key's hash finds an entry, and the full key stored with the reply must match. Anyone with access to this Redis
    can read prompts (as token ids) and replies, as in the server's own memory. API keys are never stored in it.

    Raises:
        ValueError: the Redis URL is not valid.
        ImportError: the `redis` extra is not installed.
    """

    def __init__(self, redis_url: str, *, ttl_seconds: float, max_entry_bytes: int) -> None:
        self._redis = RedisClient(redis_url, subject="response cache", timeout_seconds=STORE_TIMEOUT_SECONDS)
        self._ttl_milliseconds = max(1, round(min(ttl_seconds, MAX_TTL_SECONDS) * 1000))
        self._max_entry_bytes = max_entry_bytes
        self.hits = 0
        self.misses = 0

    @property
    def store_up(self) -> bool:
        """Whether Redis answered the last command."""
        return self._redis.up

    @property
    def bytes_used(self) -> int:
        """No memory of this process: always 0."""
        return 0

    async def get(self, key: CacheKey) -> CacheEntry | None:
        """Return the reply of an equal request; None, which counts as a miss, also if Redis is unavailable."""
        entry = await self.peek(key)
        if entry is None:
            self.misses += 1
        return entry

    async def peek(self, key: CacheKey) -> CacheEntry | None:
        """Return the reply of an equal request that was counted already, or None."""
        canonical = _canonical(key)
        stored = await self._execute("GET", _redis_key(canonical))
        return None if stored is None else _parse(stored, canonical)

    async def put(self, key: CacheKey, entry: CacheEntry) -> None:
        """Store a complete reply, if it is small enough and Redis is available."""
        canonical = _canonical(key)
        stored = canonical + b"\n" + json.dumps(dataclasses.asdict(entry)).encode()
        if len(stored) <= self._max_entry_bytes:
            await self._execute("SET", _redis_key(canonical), stored, "PX", self._ttl_milliseconds)

    async def close(self) -> None:
        """Disconnect from Redis; its entries stay for the other replicas."""
        await self._redis.close()

    async def _execute(self, *command: str | bytes | int) -> bytes | None:
        """Return Redis' answer; None for a missing key, and if Redis is unavailable."""
        try:
            answer: bytes | None = await self._redis.execute(lambda: self._redis.client.execute_command(*command))
        except RedisUnavailable:
            return None
        return answer


@dataclass(frozen=True, slots=True)
class _SizedEntry:
    entry: CacheEntry
    size: int


def _size_of(value: object) -> int:
    """Return the memory of a key or an entry, each part counted in full."""
    size = math.ceil(sys.getsizeof(value) / ALLOCATION_BYTES) * ALLOCATION_BYTES
    if dataclasses.is_dataclass(value):
        return size + sum(map(_size_of, _fields(value)))
    if isinstance(value, tuple):
        return size + sum(map(_size_of, value))
    return size


def _fields(value: Any) -> list[object]:
    return [getattr(value, field.name) for field in dataclasses.fields(value)]


def _canonical(key: CacheKey) -> bytes:
    """Return the full key in one line; equal only for equal keys."""
    return json.dumps(_fields(key)).encode()


def _redis_key(canonical: bytes) -> str:
    return f"llama2:response:{_digest(canonical)}"


def _digest(canonical: bytes) -> str:
    return hashlib.sha256(canonical).hexdigest()


def _parse(stored: bytes, canonical: bytes) -> CacheEntry | None:
    """Return the entry; None if it belongs to another key or cannot be parsed."""
    stored_key, _, reply = stored.partition(b"\n")
    if stored_key != canonical:
        return None
    try:
        return CacheEntry(**json.loads(reply))
    except (ValueError, TypeError):
        return None
