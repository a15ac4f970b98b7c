"""Requests per minute per account: an exact sliding window, in memory or in one Redis for all replicas.

A replica's wall clock is never used: the window in memory uses the event loop's clock, and the window in Redis uses
Redis' clock. The decision and the time of the next allowed request come from one read, so that RetryInfo is exact.
"""

import asyncio
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llama2_server.admission.keys.account_limits import NO_LIMITS, LimitsOf
from llama2_server.admission.quota_windows import LocalWindows, RedisWindows, Window
from llama2_server.card import RequestsPerMinute
from llama2_server.errors import QuotaExceeded, QuotaStoreUnavailable, ServiceError
from llama2_server.redis_client import RedisUnavailable

RETURN_SECONDS = 1.0
"""The longest time after its retry time at which an obedient call returns."""

UNKEPT_SECONDS = 5.0
"""How long other calls can use a request whose expected call has not come, before it is kept for the next one."""

ExpectedCalls = Callable[[str], Sequence[float]]
"""Returns sorted times of the event loop's clock for an account; each call comes at most RETURN_SECONDS later."""


@dataclass(frozen=True, slots=True)
class QuotaStatus:
    """The state of an account's quota."""

    limit: int
    """Requests per minute."""
    remaining: int
    """Requests that are allowed now; some may be kept for calls that were told to return."""
    resets_in_seconds: float
    """Seconds until all requests are allowed again; 0 if they are now."""


@dataclass(frozen=True, slots=True)
class QuotaUnit:
    """One consumed request of an account's quota, for `Quota.refund`; times in microseconds identify it."""

    account_id: str
    local_at: int | None
    """Time by the event loop's clock; None if this process did not count it."""
    shared_at: int | None
    """Time by Redis' clock; None if Redis did not count it."""


class Quota(Collector):
    """Requests per `window_seconds`, per account.

    Args:
        limits: the card's limits.
        limits_of: the limits in the keys file, which precede the card's.
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
        limits_of: LimitsOf = lambda account_id: NO_LIMITS,
    ) -> None:
        self._limits = limits
        self._limits_of = limits_of
        self._fallback = fallback
        self._window_seconds = window_seconds
        window = round(window_seconds * 1e6)
        self._local = LocalWindows(window)
        self._shared = None if redis_url is None else RedisWindows(redis_url, window, model)
        self.store_errors = 0
        """Requests that could not be counted in Redis."""
        self.expected_calls: ExpectedCalls = lambda account_id: ()
        """Returns the times at which rejected calls of an account are told to return; units are kept for them."""

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
        """Return the account's requests per minute: of the keys file, otherwise of the card, otherwise the default."""
        own = self._limits_of(account_id).requests_per_minute
        return own if own is not None else self._limits.accounts.get(account_id, self._limits.default)

    @asynccontextmanager
    async def charge(self, account_id: str) -> AsyncIterator[None]:
        """Consume one request for the body; give it back if the body ends with an error that refunds quota.

        Raises:
            QuotaExceeded, QuotaStoreUnavailable: as `consume`.
        """
        unit = await self.consume(account_id)
        try:
            yield
        except ServiceError as error:
            if error.refunds_quota:
                await self.refund(unit)
            raise

    async def consume(self, account_id: str) -> QuotaUnit:
        """Consume one request of the account's quota.

        Raises:
            QuotaExceeded: the quota is used up; nothing was counted.
            QuotaStoreUnavailable: Redis is unavailable, and the fallback is `reject`.
        """
        limit, expected_in = self.limit(account_id), self._expected_in(account_id)
        shared = await self._use_shared(account_id, limit, "consume", expected_in)
        if shared is not None and not shared.allowed:
            raise QuotaExceeded(account_id, limit, shared.retry_in / 1e6)
        # If Redis becomes unavailable, this replica continues from the requests that it allowed itself.
        local = self._local.use(account_id, limit, consume=True, expected_in=expected_in if shared is None else ())
        if shared is None and not local.allowed:
            raise QuotaExceeded(account_id, limit, local.retry_in / 1e6)
        return QuotaUnit(account_id, local.now if local.allowed else None, None if shared is None else shared.now)

    async def refund(self, unit: QuotaUnit) -> None:
        """Give a consumed request back; while Redis is unavailable, it counts there until it leaves the window."""
        if unit.local_at is not None:
            self._local.refund(unit.account_id, unit.local_at)
        if self._shared is not None and unit.shared_at is not None:
            try:
                await self._shared.use(unit.account_id, self.limit(unit.account_id), "refund", unit.shared_at)
            except RedisUnavailable:
                self.store_errors += 1

    async def status(self, account_id: str) -> QuotaStatus:
        """Return the state of the account's quota, without counting a request.

        Raises:
            QuotaStoreUnavailable: as `consume`.
        """
        limit = self.limit(account_id)
        window = await self._use_shared(account_id, limit, "read")
        if window is None:
            window = self._local.use(account_id, limit, consume=False)
        return QuotaStatus(limit, window.free, window.reset_in / 1e6)

    async def retry_seconds(self, account_id: str) -> float:
        """Return the time until one more request is allowed if all expected calls come; nothing is counted.

        Raises:
            QuotaStoreUnavailable: as `consume`.
        """
        limit, expected = self.limit(account_id), self.expected_calls(account_id)
        if len(expected) >= limit:
            now = asyncio.get_running_loop().time()
            at = expected[-limit] + RETURN_SECONDS + UNKEPT_SECONDS + self._window_seconds
            return max(0.0, at - now)
        window = await self._use_shared(account_id, limit - len(expected), "read")
        if window is None:
            window = self._local.use(account_id, limit - len(expected), consume=False)
        return window.retry_in / 1e6

    async def close(self) -> None:
        """Disconnect from Redis."""
        if self._shared is not None:
            await self._shared.close()

    def _expected_in(self, account_id: str) -> Sequence[int]:
        """Return the times in microseconds until calls come that were told to return; 0 for one that is due."""
        times = self.expected_calls(account_id)
        if not times:
            return ()
        now = asyncio.get_running_loop().time()
        first, last = bisect_left(times, now - RETURN_SECONDS), bisect_right(times, now + self._window_seconds)
        # A microsecond more than the time that a rounded clock gave.
        return [max(0, round((at - now) * 1e6) + 1) for at in times[first:last]]

    async def _use_shared(
        self, account_id: str, limit: int, operation: Literal["read", "consume"], expected_in: Sequence[int] = ()
    ) -> Window | None:
        """Return the window in Redis; None if this process counts. Raises QuotaStoreUnavailable."""
        if self._shared is None:
            return None
        try:
            return await self._shared.use(account_id, limit, operation, expected_in=expected_in)
        except RedisUnavailable:
            self.store_errors += 1
            if self._fallback == "reject":
                raise QuotaStoreUnavailable("the quota store is unavailable; retry") from None
            return None
