"""The waiting line in front of the engine: a fixed number of slots, bounded, fair, and aware of deadlines.

First come, first served within an account; round robin between accounts, so that a flood from one never starves
another. All of it runs on the event loop: there are no locks because nothing awaits between a look and a change.
"""

import asyncio
import heapq
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llama2_server.errors import DeadlineExceeded, QueueFull, QueueWaitTooLong, ShuttingDown

# How much the newest holding time counts in the running mean: a change of load shows after a handful of requests.
EMA_ALPHA = 0.3


@dataclass(frozen=True, slots=True, eq=False)
class SlotLease:
    """A slot that is held."""

    queue_seconds: float
    """The time spent in line for it."""
    begun: float
    """When it was got, by the loop's clock."""


class RequestQueue(Collector):
    """`limit` slots behind a line of at most `max_queue_size` calls, each waiting at most `queue_timeout_seconds`.

    `on_waited` hears how long each call waited for its slot, or until it left the line without one.
    """

    def __init__(
        self,
        limit: int,
        *,
        max_queue_size: int,
        queue_timeout_seconds: float,
        on_waited: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._limit = limit
        self._on_waited = on_waited
        self._max_queue_size = max_queue_size
        self._queue_timeout_seconds = queue_timeout_seconds
        self._granted = 0  # slots that are held, or on their way to a waiter who has not run yet
        self._turns: set[SlotLease] = set()
        self._line: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # the first account is served next
        self._mean_hold_seconds: float | None = None
        self._closed = False

    @property
    def running(self) -> int:
        """Slots in use."""
        return self._granted

    @property
    def waiting(self) -> int:
        """Calls in line."""
        # tuple() copies in one step, because the scrape thread reads this too.
        return sum(map(len, tuple(self._line.values())))

    def collect(self) -> Iterator[Metric]:
        """Yield the queue's metrics, on the scrape thread."""
        yield GaugeMetricFamily("llama2_requests_queued", "Number of requests in the queue.", self.waiting)
        yield GaugeMetricFamily("llama2_requests_running", "Number of slots in use.", self.running)
        limit = "Number of slots: the card's max_concurrent_requests."
        yield GaugeMetricFamily("llama2_max_concurrent_requests", limit, self._limit)

    @asynccontextmanager
    async def acquire(self, account: str, deadline: float | None) -> AsyncIterator[SlotLease]:
        """Wait in line and hold a slot for the body of the `async with`.

        Args:
            account: whose turn it is.
            deadline: by the loop's clock, or None.

        Raises:
            QueueFull: there is no place in line.
            QueueWaitTooLong: the wait would outlast, or has outlasted, the deadline or the line's limit.
            DeadlineExceeded: the deadline passed in line.
            ShuttingDown: the server is shutting down.
        """
        arrived = _now()
        self.check_open()
        if self._granted < self._limit:
            self._granted += 1
            self._on_waited(0.0)
        else:
            self.check_wait(account, deadline)
            try:
                await self._wait_in_queue(account, deadline)
            finally:
                self._on_waited(_now() - arrived)
        turn = SlotLease(_now() - arrived, _now())
        self._turns.add(turn)
        try:
            yield turn
        finally:
            self._turns.remove(turn)
            self._update_mean_hold(_now() - turn.begun)
            self._release()

    def close(self) -> None:
        """Refuse all who wait and all who come with ShuttingDown; slots that are held are left to finish."""
        self._closed = True
        for waiters in self._line.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(_draining())
        self._line.clear()

    def check_open(self) -> None:
        """Refuse a call before anything is counted for it.

        Raises:
            ShuttingDown: the server is shutting down.
        """
        if self._closed:
            raise _draining()

    def estimated_wait_seconds(self, account: str) -> float:
        """How long a call of this account that came now would wait; 0 while nothing is known yet."""
        if self._granted < self._limit:
            return 0.0
        free_in = self._slot_free_times()
        mean = self._mean_hold_seconds or 0.0
        for _ in range(self._position(account)):
            heapq.heapreplace(free_in, free_in[0] + mean)
        return free_in[0]

    def check_wait(self, account: str, deadline: float | None) -> None:
        """Refuse a call of this account that has no place in line, or that would wait in vain.

        Raises:
            QueueFull, QueueWaitTooLong: as `acquire`.
        """
        if self._granted < self._limit:
            return
        if self.waiting >= self._max_queue_size:
            raise QueueFull(
                f"all {self._max_queue_size} places in the waiting line are taken", self._slot_free_times()[0]
            )
        patience = self._queue_timeout_seconds
        if deadline is not None:
            patience = min(patience, deadline - _now())
        estimate = self.estimated_wait_seconds(account)
        if estimate > patience:
            raise self._too_long(patience, estimate)

    async def _wait_in_queue(self, account: str, deadline: float | None) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.setdefault(account, deque()).append(waiter)
        limit = _now() + self._queue_timeout_seconds
        try:
            async with asyncio.timeout_at(limit if deadline is None else min(limit, deadline)):
                await waiter
        except TimeoutError:
            self._abandon(account, waiter)
            if deadline is not None and deadline <= limit:
                raise DeadlineExceeded("the deadline passed in the waiting line") from None
            raise self._too_long(self._queue_timeout_seconds, self.estimated_wait_seconds(account)) from None
        except BaseException:
            self._abandon(account, waiter)
            raise

    def _too_long(self, patience: float, estimate: float) -> QueueWaitTooLong:
        message = f"the estimated wait is {estimate:.1f} s, and this call can wait {max(0.0, patience):.1f} s"
        return QueueWaitTooLong(message, max(estimate - patience, 0.0))

    def _abandon(self, account: str, waiter: asyncio.Future[None]) -> None:
        """Take a waiter out of line; a slot that reached it too late goes on to the next one."""
        waiters = self._line.get(account)
        if waiters is not None and waiter in waiters:
            waiters.remove(waiter)
            if not waiters:
                del self._line[account]
        elif waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            self._release()

    def _release(self) -> None:
        """Pass a slot to the next in line; its account goes to the end of the round."""
        while self._line:
            account, waiters = self._line.popitem(last=False)
            waiter = waiters.popleft()
            if waiters:
                self._line[account] = waiters
            if not waiter.done():
                waiter.set_result(None)
                return
        self._granted -= 1

    def _update_mean_hold(self, hold_seconds: float) -> None:
        mean = hold_seconds if self._mean_hold_seconds is None else self._mean_hold_seconds
        self._mean_hold_seconds = mean + EMA_ALPHA * (hold_seconds - mean)

    def _slot_free_times(self) -> list[float]:
        """When each slot is expected to be free, as a heap."""
        mean = self._mean_hold_seconds or 0.0
        free_in = [max(0.0, turn.begun + mean - _now()) for turn in self._turns]
        free_in += [mean] * (self._limit - len(free_in))
        heapq.heapify(free_in)
        return free_in

    def _position(self, account: str) -> int:
        """How many waiting calls would be served before a new one of this account."""
        own = len(self._line.get(account, ()))
        accounts = list(self._line)
        place = accounts.index(account) if own else len(accounts)
        others = ((index, len(self._line[other])) for index, other in enumerate(accounts) if other != account)
        return own + sum(min(waiting, own + (index < place)) for index, waiting in others)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _draining() -> ShuttingDown:
    return ShuttingDown("the server is shutting down; try another one, or this one again when it is back")
