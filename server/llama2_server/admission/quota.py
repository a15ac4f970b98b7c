"""Requests per minute, per account: an exact moving window, in memory or in one Redis for all replicas.

No wall clock of a replica decides: the window in memory follows the event loop's clock, the one in Redis follows Redis'
own. What is decided, and when the next request fits, comes from one look, so that a promised time is kept.
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
# ARGV: limit, window in microseconds, 1 to take or 0 to look.  Returns the fields of _Window.
_WINDOW_SCRIPT = """
local key, limit, window = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function leaves_in(index)
  local entry = redis.call('LINDEX', key, index)
  return entry and tonumber(entry) + window - now
end
-- Redis' clock was set back: what lies in its future counts as made now, so that nobody waits longer than one window.
local index = 0
while (leaves_in(index) or 0) > window do
  redis.call('LSET', key, index, string.format('%.0f', now))
  index = index + 1
end
while (leaves_in(-1) or 1) <= 0 do redis.call('RPOP', key) end
local used = redis.call('LLEN', key)
local taken = 0
if ARGV[3] == '1' and used < limit then
  redis.call('LPUSH', key, string.format('%.0f', now))
  redis.call('PEXPIRE', key, math.ceil(window / 1000))
  taken, used = 1, used + 1
end
return {taken, used, used >= limit and leaves_in(limit - 1) or 0, leaves_in(0) or 0}
"""


@dataclass(frozen=True, slots=True)
class QuotaStatus:
    """How an account stands."""

    limit: int
    """Requests in any minute."""
    left: int
    """How many of them may be made now."""
    resets_in_seconds: float
    """When all of them may be made again; 0 if they may now."""


class _Window(NamedTuple):
    """An account's window after a look at it; times in microseconds."""

    taken: bool
    used: int
    fits_in: int
    """When one more request fits; 0 if one does now."""
    empty_in: int


class Quota(Collector):
    """Requests in any `window_seconds`, per account.

    Args:
        limits: the card's.
        redis_url: counts for all replicas in this Redis; None counts in this process.
        fallback: while Redis is gone, `refuse` every request, or hold the limits per replica (`local`).
        model: what the limits belong to: services of different models may share a Redis.
        window_seconds: a minute; tests take less.

    Raises:
        ValueError: this is no Redis URL.
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
        self.store_failures = 0
        """Requests that could not be counted in Redis."""

    @property
    def store_up(self) -> bool:
        """Whether the store answered when it was last asked; always, in memory."""
        return self._shared is None or self._shared.up

    def collect(self) -> Iterator[Metric]:
        """Yield the quota store's metrics, on the scrape thread."""
        up = "1 if the quota store answered the last command, or if quotas are kept in memory; else 0."
        yield GaugeMetricFamily("llama2_quota_store_up", up, self.store_up)
        errors = "Requests that could not be counted in the shared quota store."
        yield CounterMetricFamily("llama2_quota_store_errors", errors, self.store_failures)

    async def take(self, account: str) -> None:
        """Count one request.

        Raises:
            QuotaExceeded: the account has used up its requests; nothing was counted.
            QuotaStoreUnavailable: Redis does not answer, and the fallback is to reject.
        """
        limit = self._limit(account)
        window = await self._use(account, limit, take=True)
        if not window.taken:
            raise QuotaExceeded(account, limit, window.fits_in / 1e6)

    async def status(self, account: str) -> QuotaStatus:
        """How the account stands; counts nothing.

        Raises:
            QuotaStoreUnavailable: as `take`.
        """
        limit = self._limit(account)
        window = await self._use(account, limit, take=False)
        return QuotaStatus(limit, max(0, limit - window.used), window.empty_in / 1e6)

    async def close(self) -> None:
        """Leave Redis."""
        if self._shared is not None:
            await self._shared.close()

    def _limit(self, account: str) -> int:
        return self._limits.accounts.get(account, self._limits.default)

    async def _use(self, account: str, limit: int, *, take: bool) -> _Window:
        if self._shared is None:
            return self._local.use(account, limit, take=take)
        try:
            window = await self._shared.use(account, limit, take=take)
        except RedisUnavailable:
            self.store_failures += 1
            if self._fallback == "reject":
                raise QuotaStoreUnavailable("requests cannot be counted now; try again") from None
            return self._local.use(account, limit, take=take)
        if window.taken:
            # Should Redis go, this replica starts from what it let in itself, not from nothing.
            self._local.use(account, limit, take=True)
        return window


class _LocalWindows:
    """The windows of this process, by the event loop's clock."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._taken_at: defaultdict[str, deque[int]] = defaultdict(deque)  # oldest first, no more than the limit

    def use(self, account: str, limit: int, *, take: bool) -> _Window:
        now = round(asyncio.get_running_loop().time() * 1e6)
        taken_at = self._taken_at[account]
        while taken_at and taken_at[0] + self._window <= now:
            taken_at.popleft()
        taken = take and len(taken_at) < limit
        if taken:
            taken_at.append(now)
        fits_in = taken_at[-limit] + self._window - now if len(taken_at) >= limit else 0
        return _Window(taken, len(taken_at), fits_in, taken_at[-1] + self._window - now if taken_at else 0)


class _RedisWindows:
    """The windows of all replicas, in Redis and by its clock; every call is one atomic script."""

    def __init__(self, url: str, window: int, model: str) -> None:
        self._link = RedisClient(url, subject="quota store", timeout_seconds=STORE_TIMEOUT_SECONDS)
        self._script: Any = self._link.client.register_script(_WINDOW_SCRIPT)
        self._window = window
        self._prefix = f"llama2:quota:{model}:"

    @property
    def up(self) -> bool:
        return self._link.up

    async def use(self, account: str, limit: int, *, take: bool) -> _Window:
        """Raises RedisUnavailable."""
        keys, arguments = [self._prefix + account], [limit, self._window, int(take)]
        taken, used, fits_in, empty_in = await self._link.execute(lambda: self._script(keys=keys, args=arguments))
        return _Window(bool(taken), used, fits_in, empty_in)

    async def close(self) -> None:
        await self._link.close()
