"""The request queue in front of the engine: a fixed number of slots, bounded, fair, and aware of deadlines.

First come, first served within an account; round robin between accounts, so that a flood from one account never
starves another. It runs on the event loop and needs no locks: nothing awaits between a check and a change.
"""

import asyncio
import heapq
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llama2_server.errors import DeadlineExceeded, QueueFull, QueueWaitTooLong, ShuttingDown

logger = logging.getLogger(__name__)

# Weight of the newest hold in the moving average: a change of load shows after a handful of requests.
EMA_ALPHA = 0.3
GRANT_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class SlotLease:
    """A slot in use."""

    queue_seconds: float
    """Time in the queue."""
    started_at: float
    """When the slot was granted, by the event loop's clock."""


class RequestQueue(Collector):
    """`slots` slots behind a fair queue of at most `max_queue_size` requests.

    Each request waits at most `queue_timeout_seconds`. `on_waited` is called with each queue time, also when a request
    leaves the queue without a slot.
    """

    def __init__(
        self,
        slots: int,
        *,
        max_queue_size: int,
        queue_timeout_seconds: float,
        on_waited: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._slots = slots
        self._on_waited = on_waited
        self._max_queue_size = max_queue_size
        self._queue_timeout_seconds = queue_timeout_seconds
        self._granted = 0  # slots in use, or granted to a request whose task has not run yet
        self._leases: set[SlotLease] = set()
        self._waiters: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # the first account is next
        self._mean_hold_seconds: float | None = None
        self._closed = False
        self._grant_retry: asyncio.TimerHandle | None = None

    @property
    def running(self) -> int:
        """Slots in use."""
        return self._granted

    @property
    def waiting(self) -> int:
        """Queued requests."""
        # tuple() copies in one step, because the scrape thread reads this too.
        return sum(map(len, tuple(self._waiters.values())))

    def collect(self) -> Iterator[Metric]:
        """Yield the queue's metrics, on the scrape thread."""
        yield GaugeMetricFamily("llama2_requests_queued", "Number of requests in the queue.", self.waiting)
        yield GaugeMetricFamily("llama2_requests_running", "Number of slots in use.", self.running)
        slots = "Number of slots: the card's max_concurrent_requests."
        yield GaugeMetricFamily("llama2_max_concurrent_requests", slots, self._slots)

    @asynccontextmanager
    async def slot(self, account_id: str, deadline: float | None) -> AsyncIterator[SlotLease]:
        """Wait for a slot, and hold it for the body.

        Args:
            account_id: the account that the request belongs to.
            deadline: a time of the event loop's clock, or None.

        Raises:
            QueueFull: the queue is full.
            QueueWaitTooLong: the wait would exceed, or has exceeded, the deadline or the queue timeout.
            DeadlineExceeded: the deadline passed in the queue.
            ShuttingDown: the server is shutting down.
        """
        arrived_at = _now()
        self.check_open()
        if self._granted < self._slots:
            self._granted += 1
            self._report_wait(0.0)
        else:
            self.check_wait(account_id, deadline)
            try:
                await self._wait_in_queue(account_id, deadline)
            finally:
                self._report_wait(_now() - arrived_at)
        lease = SlotLease(_now() - arrived_at, _now())
        self._leases.add(lease)
        try:
            yield lease
        finally:
            self._end_lease(lease)

    def close(self) -> None:
        """Reject queued and new requests with ShuttingDown; requests that hold a slot finish."""
        self._closed = True
        for waiters in self._waiters.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(_shutting_down())
        self._waiters.clear()

    def check_open(self) -> None:
        """Check that the queue is open.

        Raises:
            ShuttingDown: the server is shutting down.
        """
        if self._closed:
            raise _shutting_down()

    def estimated_wait_seconds(self, account_id: str) -> float:
        """Return how long a new request of this account would wait; 0 before the first measurement."""
        if self._granted < self._slots:
            return 0.0
        free_times = self._slot_free_times()
        mean = self._mean_hold_seconds or 0.0
        for _ in range(self._position(account_id)):
            heapq.heapreplace(free_times, free_times[0] + mean)
        return free_times[0]

    def check_wait(self, account_id: str, deadline: float | None) -> None:
        """Check that a new request of this account would get a slot in time.

        Raises:
            QueueFull, QueueWaitTooLong: as `slot`.
        """
        if self._granted < self._slots:
            return
        if self.waiting >= self._max_queue_size:
            raise QueueFull(f"the request queue is full ({self._max_queue_size} waiting)", self._slot_free_times()[0])
        limit_seconds = self._queue_timeout_seconds
        if deadline is not None:
            limit_seconds = min(limit_seconds, deadline - _now())
        estimate = self.estimated_wait_seconds(account_id)
        if estimate > limit_seconds:
            raise self._wait_too_long(limit_seconds, estimate)

    async def _wait_in_queue(self, account_id: str, deadline: float | None) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(account_id, deque()).append(waiter)
        timeout_at = _now() + self._queue_timeout_seconds
        try:
            async with asyncio.timeout_at(timeout_at if deadline is None else min(timeout_at, deadline)):
                await waiter
        except TimeoutError:
            self._abandon(account_id, waiter)
            if deadline is not None and deadline <= timeout_at:
                raise DeadlineExceeded("the deadline passed in the request queue") from None
            estimate = self.estimated_wait_seconds(account_id)
            raise self._wait_too_long(self._queue_timeout_seconds, estimate) from None
        except BaseException:
            self._abandon(account_id, waiter)
            raise

    def _wait_too_long(self, limit_seconds: float, estimate: float) -> QueueWaitTooLong:
        message = f"the estimated wait is {estimate:.1f} s, and this call can wait {max(0.0, limit_seconds):.1f} s"
        return QueueWaitTooLong(message, max(estimate - limit_seconds, 0.0))

    def _abandon(self, account_id: str, waiter: asyncio.Future[None]) -> None:
        """Remove a waiter from the queue; a slot that was already granted to it goes to the next one."""
        waiters = self._waiters.get(account_id)
        if waiters is not None and waiter in waiters:
            waiters.remove(waiter)
            if not waiters:
                del self._waiters[account_id]
        elif waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            self._release()

    def _report_wait(self, seconds: float) -> None:
        try:
            self._on_waited(seconds)
        except Exception:  # an observer must not change what happens to a slot
            logger.exception("the time in the queue could not be reported")

    def _end_lease(self, lease: SlotLease) -> None:
        """Free the slot of a lease, whatever fails."""
        self._leases.discard(lease)
        try:
            self._update_mean_hold(_now() - lease.started_at)
        except Exception:  # the next request needs the slot; only its estimated wait is less exact
            logger.exception("the mean time of a lease could not be updated")
        self._release()

    def _release(self) -> None:
        self._granted -= 1
        self._grant_free_slots()

    def _grant_free_slots(self) -> None:
        """Grant the free slots; after a failure try again later, because no other event may follow."""
        try:
            while self._granted < self._slots and self._waiters:
                self._grant_next()
        except Exception:  # the slots are free: new requests get them
            logger.exception("a free slot could not be granted")
            if self._grant_retry is not None:
                self._grant_retry.cancel()
            self._grant_retry = asyncio.get_running_loop().call_later(GRANT_RETRY_SECONDS, self._grant_free_slots)

    def _grant_next(self) -> None:
        """Grant a slot to the next waiter, whose account moves to the end of the round."""
        account_id, waiters = self._waiters.popitem(last=False)
        waiter = waiters.popleft()
        if waiters:
            self._waiters[account_id] = waiters
        if not waiter.done():
            waiter.set_result(None)
            self._granted += 1

    def _update_mean_hold(self, hold_seconds: float) -> None:
        mean = hold_seconds if self._mean_hold_seconds is None else self._mean_hold_seconds
        self._mean_hold_seconds = mean + EMA_ALPHA * (hold_seconds - mean)

    def _slot_free_times(self) -> list[float]:
        """Return, as a heap, the seconds until each slot is expected to be free."""
        mean = self._mean_hold_seconds or 0.0
        free_times = [max(0.0, lease.started_at + mean - _now()) for lease in self._leases]
        free_times += [mean] * (self._slots - len(free_times))
        heapq.heapify(free_times)
        return free_times

    def _position(self, account_id: str) -> int:
        """Return how many queued requests would be served before a new one of this account."""
        own = len(self._waiters.get(account_id, ()))
        account_ids = list(self._waiters)
        place = account_ids.index(account_id) if own else len(account_ids)
        others = ((index, len(self._waiters[other])) for index, other in enumerate(account_ids) if other != account_id)
        return own + sum(min(waiting, own + (index < place)) for index, waiting in others)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the server is shutting down; retry")
