"""The request queue in front of the engine: a fixed number of slots, bounded, fair, and aware of deadlines.

First come, first served within an account; round robin between accounts. In a full queue, a request of an account with
few requests displaces one of the account with the most, so that a flood from one account never starves another. The
queue runs on the event loop and needs no locks: nothing awaits between a check and a change.
"""

import asyncio
import heapq
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llama2_server.admission.reservation import Reservation, SlotLease
from llama2_server.admission.round_robin import RoundRobin
from llama2_server.errors import DeadlineExceeded, QueueFull, QueueWaitTooLong, ShuttingDown

logger = logging.getLogger(__name__)

# Weight of the newest hold in the moving average: a change of load shows after a handful of requests.
EMA_ALPHA = 0.3
GRANT_RETRY_SECONDS = 1.0


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
        self._waiting: RoundRobin[Reservation] = RoundRobin()
        self._displacing: Counter[str] = Counter()  # reservations per account that displace another when confirmed
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
        return len(self._waiting)

    def collect(self) -> Iterator[Metric]:
        """Yield the queue's metrics, on the scrape thread."""
        yield GaugeMetricFamily("llama2_requests_queued", "Number of requests in the queue.", self.waiting)
        yield GaugeMetricFamily("llama2_requests_running", "Number of slots in use.", self.running)
        slots = "Number of slots: the card's max_concurrent_requests."
        yield GaugeMetricFamily("llama2_max_concurrent_requests", slots, self._slots)
        mean = "Moving average of the time that a request holds its slot; 0 before the first one."
        yield GaugeMetricFamily("llama2_mean_slot_time_seconds", mean, self._mean_hold_seconds or 0.0)

    def reserve(self, account_id: str, deadline: float | None) -> Reservation:
        """Reserve a slot or space in the queue for a request; the caller must `confirm` or `release` it.

        If the queue is full, a request whose account has at least two requests fewer in it than the largest account
        still gets a reservation. When it is confirmed, it displaces the newest request of the largest account.

        Args:
            account_id: the account that the request belongs to.
            deadline: a time of the event loop's clock, or None.

        Raises:
            QueueFull: the queue is full.
            QueueWaitTooLong: the wait would exceed the deadline or the queue timeout.
            ShuttingDown: the server is shutting down.
        """
        self.check_open()
        reservation = Reservation(account_id, displaces=not self._has_space())
        if reservation.displaces and not self._may_displace(account_id, self._displacing[account_id]):
            raise self._queue_full()
        self._check_wait(account_id, deadline)
        if reservation.displaces:
            self._displacing[account_id] += 1
        else:
            self._waiting.add(account_id, reservation)
        return reservation

    def confirm(self, reservation: Reservation) -> None:
        """Let a reservation wait for its slot; call `slot` or `release` next.

        Raises:
            QueueFull: a request of another account has displaced this one, or this one can no longer displace another.
            ShuttingDown: the server is shutting down.
        """
        if reservation.displaces:
            self._end_displacing(reservation)
            self.check_open()
            self._make_space(reservation.account_id)
            self._waiting.add(reservation.account_id, reservation)
        elif reservation.error is not None:
            raise reservation.error
        reservation.confirmed_at = _now()
        self._grant_free_slots()

    def enter(self, account_id: str, deadline: float | None) -> Reservation:
        """Reserve and confirm in one step; raises as `reserve`."""
        reservation = self.reserve(account_id, deadline)
        self.confirm(reservation)
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Leave the queue, or free the slot; no-op if the reservation has left already."""
        if reservation.displaces:
            self._end_displacing(reservation)
        elif reservation.granted:
            reservation.granted = False
            self._release()
        else:
            self._waiting.remove(reservation.account_id, reservation)

    @asynccontextmanager
    async def slot(self, reservation: Reservation, deadline: float | None) -> AsyncIterator[SlotLease]:
        """Wait for the slot of a confirmed reservation until the deadline, and hold it for the body.

        Raises:
            QueueFull: a request of another account has displaced this one.
            QueueWaitTooLong: the wait has exceeded the queue timeout.
            DeadlineExceeded: the deadline passed in the queue.
            ShuttingDown: the server is shutting down.
        """
        started_at = reservation.confirmed_at
        try:
            await self._wait_until_granted(reservation, deadline)
        except BaseException:
            self.release(reservation)
            raise
        finally:
            self._report_wait(_now() - started_at)
        lease = SlotLease(_now() - started_at, _now())
        self._leases.add(lease)
        try:
            yield lease
        finally:
            self._end_lease(lease, reservation)

    def close(self) -> None:
        """Reject queued and new requests with ShuttingDown; requests that hold a slot finish."""
        self._closed = True
        for reservation in self._waiting.clear():
            reservation.reject(_shutting_down())

    def check_open(self) -> None:
        """Check that the queue is open.

        Raises:
            ShuttingDown: the server is shutting down.
        """
        if self._closed:
            raise _shutting_down()

    def estimated_wait_seconds(self, account_id: str) -> float:
        """Return how long a new request of this account would wait; 0 before the first measurement."""
        if self._granted + len(self._waiting) < self._slots:
            return 0.0
        free_times = self._slot_free_times()
        mean = self._mean_hold_seconds or 0.0
        for _ in range(self._waiting.position(account_id)):
            heapq.heapreplace(free_times, free_times[0] + mean)
        return free_times[0]

    def _check_wait(self, account_id: str, deadline: float | None) -> None:
        limit_seconds = self._queue_timeout_seconds
        if deadline is not None:
            limit_seconds = min(limit_seconds, deadline - _now())
        estimate = self.estimated_wait_seconds(account_id)
        if estimate > limit_seconds and self._granted + len(self._waiting) >= self._slots:
            raise self._wait_too_long(limit_seconds, estimate)

    def _has_space(self) -> bool:
        return self._granted + len(self._waiting) < self._slots + self._max_queue_size

    def _may_displace(self, account_id: str, displacing: int = 0) -> bool:
        """Return whether fairness gives an account, with `displacing` requests more than it has, a place of another."""
        largest = self._waiting.largest()
        return largest is not None and self._waiting.count(account_id) + displacing + 2 <= self._waiting.count(largest)

    def _make_space(self, account_id: str) -> None:
        """Displace the newest request of the largest account, unless there is space; raises QueueFull."""
        if self._has_space():
            return
        largest = self._waiting.largest()
        if largest is None or not self._may_displace(account_id):
            raise self._queue_full()
        message = "the request queue is full, and an account with fewer requests in it came first; retry"
        self._waiting.pop_newest(largest).reject(QueueFull(message, self._slot_free_times()[0]))

    def _end_displacing(self, reservation: Reservation) -> None:
        reservation.displaces = False
        self._displacing[reservation.account_id] -= 1
        if not self._displacing[reservation.account_id]:
            del self._displacing[reservation.account_id]

    async def _wait_until_granted(self, reservation: Reservation, deadline: float | None) -> None:
        timeout_at = reservation.confirmed_at + self._queue_timeout_seconds
        try:
            async with asyncio.timeout_at(timeout_at if deadline is None else min(timeout_at, deadline)):
                await reservation.decided
        except TimeoutError:
            self.release(reservation)
            if deadline is not None and deadline <= timeout_at:
                raise DeadlineExceeded("the deadline passed in the request queue") from None
            estimate = self.estimated_wait_seconds(reservation.account_id)
            raise self._wait_too_long(self._queue_timeout_seconds, estimate) from None
        if reservation.error is not None:
            raise reservation.error

    def _queue_full(self) -> QueueFull:
        message = f"the request queue is full ({self._max_queue_size} waiting)"
        return QueueFull(message, self._slot_free_times()[0])

    def _wait_too_long(self, limit_seconds: float, estimate: float) -> QueueWaitTooLong:
        message = f"the estimated wait is {estimate:.1f} s, and this call can wait {max(0.0, limit_seconds):.1f} s"
        return QueueWaitTooLong(message, max(estimate - limit_seconds, 0.0))

    def _report_wait(self, seconds: float) -> None:
        try:
            self._on_waited(seconds)
        except Exception:  # an observer must not change what happens to a slot
            logger.exception("the time in the queue could not be reported")

    def _end_lease(self, lease: SlotLease, reservation: Reservation) -> None:
        """Free the slot of a lease, whatever fails."""
        self._leases.discard(lease)
        try:
            self._update_mean_hold(_now() - lease.started_at)
        except Exception:  # the next request needs the slot; only its estimated wait is less exact
            logger.exception("the mean time of a lease could not be updated")
        self.release(reservation)

    def _release(self) -> None:
        self._granted -= 1
        self._grant_free_slots()

    def _grant_free_slots(self) -> None:
        """Grant the free slots; after a failure try again later, because no other event may follow."""
        try:
            while self._granted < self._slots and self._grant_next():
                pass
        except Exception:  # the slots are free: new requests get them
            logger.exception("a free slot could not be granted")
            if self._grant_retry is not None:
                self._grant_retry.cancel()
            self._grant_retry = asyncio.get_running_loop().call_later(GRANT_RETRY_SECONDS, self._grant_free_slots)

    def _grant_next(self) -> bool:
        """Grant a slot to the next ready request; return False without one."""
        reservation = self._waiting.pop_next(lambda waiting: waiting.ready)
        if reservation is None:
            return False
        reservation.granted = True
        reservation.decided.set_result(None)
        self._granted += 1
        return True

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


def _now() -> float:
    return asyncio.get_running_loop().time()


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the server is shutting down; retry", refunds_quota=True)
