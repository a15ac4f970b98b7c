"""Requests per minute per account: an exact sliding window, in memory or in one Redis for all replicas.

A replica's wall clock is never used: the window in memory uses the event loop's clock, and the window in Redis uses
Redis' clock. The decision and the time of the next allowed request come from one read, so that RetryInfo is exact.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llama2_server.card import RequestsPerMinute
from llama2_server.errors import QuotaExceeded, QuotaStoreUnavailable
from llama2_server.redis_client import RedisClient, RedisUnavailable

STORE_TIMEOUT_SECONDS = 1.0

# KEYS: the account's window, a list of times in microseconds, newest first.
# ARGV: limit, window in microseconds, 1 to consume a request or 0 to read.  Returns the fields of _Window.
_WINDOW_SCRIPT = """
local key, limit, window = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function expires_in(index)
  local entry = redis.call('LINDEX', key, index)
  return entry and tonumber(entry) + window - now
end
-- If Redis' clock was set back, requests with a later time count as made now, so that no wait exceeds one window.
local index = 0
while (expires_in(index) or 0) > window do
  redis.call('LSET', key, index, string.format('%.0f', now))
  index = index + 1
end
while (expires_in(-1) or 1) <= 0 do redis.call('RPOP', key) end
local used = redis.call('LLEN', key)
local allowed = 0
if ARGV[3] == '1' and used < limit then
  redis.call('LPUSH', key, string.format('%.0f', now))
  redis.call('PEXPIRE', key, math.ceil(window / 1000))
  allowed, used = 1, used + 1
end
return {allowed, used, used >= limit and expires_in(limit - 1) or 0, expires_in(0) or 0}
"""


@dataclass(frozen=True, slots=True)
class QuotaStatus:
    """The state of an account's quota."""

    limit: int
    """Requests per minute."""
    remaining: int
    """Requests that are allowed now."""
    resets_in_seconds: float
    """Seconds until all requests are allowed again; 0 if they are now."""


class _Window(NamedTuple):
    """The state of an account's window; times in microseconds."""

    allowed: bool
    """Whether a request was consumed."""
    used: int
    retry_in: int
    """Time until one more request is allowed; 0 if one is now."""
    reset_in: int
    """Time until the window is empty."""


class Quota(Collector):
    """Requests per `window_seconds`, per account.

    Args:
        limits: the card's limits.
        redis_url: the Redis that counts for all replicas; None counts in this process.
        fallback: while Redis is unavailable, `reject` every request, or apply the limits per replica (`local`).
        model: part of the keys in Redis, because services of different models may share one.
        window_seconds: 60; shorter in tests.

    Raises:
        ValueError: the Redis URL is not valid.
        ImportError: the `redis` extra is not installed.
    """

    def __init__(
        self,
        limits: RequestsPerMinute,
        *,
        redis_url: str | None = None,
        fallback: Literal["reject", "local"] = "reject",
        model: str = "",
        window_seconds: float = 60.0,
    ) -> None:
        self._limits = limits
        self._fallback = fallback
        window = round(window_seconds * 1e6)
        self._local = _LocalWindows(window)
        self._shared = None if redis_url is None else _RedisWindows(redis_url, window, model)
        self.store_errors = 0
        """Requests that could not be counted in Redis."""

    @property
    def store_up(self) -> bool:
        """Whether Redis answered the last command; always true in memory."""
        return self._shared is None or self._shared.up

    async def probe_store(self) -> None:
        """Send a command to Redis, so that `store_up` is current without calls; no-op in memory."""
        if self._shared is not None:
            await self._shared.probe()

    def collect(self) -> Iterator[Metric]:
        """Yield the quota store's metrics, on the scrape thread."""
        up = "1 if the quota store answered the last command, or if quotas are kept in memory; else 0."
        yield GaugeMetricFamily("llama2_quota_store_up", up, self.store_up)
        errors = "Requests that could not be counted in the shared quota store."
        yield CounterMetricFamily("llama2_quota_store_errors", errors, self.store_errors)

    def limit(self, account_id: str) -> int:
        """Return the account's requests per minute: the card's value for it, otherwise the default."""
        return self._limits.accounts.get(account_id, self._limits.default)

    async def consume(self, account_id: str) -> None:
        """Consume one request of the account's quota.

        Raises:
            QuotaExceeded: the quota is used up; nothing was counted.
            QuotaStoreUnavailable: Redis is unavailable, and the fallback is `reject`.
        """
        limit = self.limit(account_id)
        window = await self._use(account_id, limit, consume=True)
        if not window.allowed:
            raise QuotaExceeded(account_id, limit, window.retry_in / 1e6)

    async def status(self, account_id: str) -> QuotaStatus:
        """Return the state of the account's quota, without counting a request.

        Raises:
            QuotaStoreUnavailable: as `consume`.
        """
        limit = self.limit(account_id)
        window = await self._use(account_id, limit, consume=False)
        return QuotaStatus(limit, max(0, limit - window.used), window.reset_in / 1e6)

    async def close(self) -> None:
        """Disconnect from Redis."""
        if self._shared is not None:
            await self._shared.close()

    async def _use(self, account_id: str, limit: int, *, consume: bool) -> _Window:
        if self._shared is None:
            return self._local.use(account_id, limit, consume=consume)
        try:
            window = await self._shared.use(account_id, limit, consume=consume)
        except RedisUnavailable:
            self.store_errors += 1
            if self._fallback == "reject":
                raise QuotaStoreUnavailable("the quota store is unavailable; retry") from None
            return self._local.use(account_id, limit, consume=consume)
        if window.allowed:
            # If Redis becomes unavailable, this replica continues from the requests that it allowed itself.
            self._local.use(account_id, limit, consume=True)
        return window


class _LocalWindows:
    """The windows of this process, by the event loop's clock."""

    def __init__(self, window: int) -> None:
        self._window = window
        # Times of the allowed requests per account, oldest first; at most as many as the limit.
        self._allowed_at: defaultdict[str, deque[int]] = defaultdict(deque)

    def use(self, account_id: str, limit: int, *, consume: bool) -> _Window:
        now = round(asyncio.get_running_loop().time() * 1e6)
        allowed_at = self._allowed_at[account_id]
        while allowed_at and allowed_at[0] + self._window <= now:
            allowed_at.popleft()
        allowed = consume and len(allowed_at) < limit
        if allowed:
            allowed_at.append(now)
        retry_in = allowed_at[-limit] + self._window - now if len(allowed_at) >= limit else 0
        reset_in = allowed_at[-1] + self._window - now if allowed_at else 0
        return _Window(allowed, len(allowed_at), retry_in, reset_in)


class _RedisWindows:
    """The windows of all replicas, in Redis and by its clock; each call is one atomic script."""

    def __init__(self, url: str, window: int, model: str) -> None:
        self._redis = RedisClient(url, subject="quota store", timeout_seconds=STORE_TIMEOUT_SECONDS)
        self._script: Any = self._redis.client.register_script(_WINDOW_SCRIPT)
        self._window = window
        self._prefix = f"llama2:quota:{model}:"

    @property
    def up(self) -> bool:
        return self._redis.up

    async def probe(self) -> None:
        await self._redis.probe()

    async def use(self, account_id: str, limit: int, *, consume: bool) -> _Window:
        """Run the script; raises RedisUnavailable."""
        keys, arguments = [self._prefix + account_id], [limit, self._window, int(consume)]
        allowed, used, retry_in, reset_in = await self._redis.execute(lambda: self._script(keys=keys, args=arguments))
        return _Window(bool(allowed), used, retry_in, reset_in)

    async def close(self) -> None:
        await self._redis.close()
