"""The request queue in front of the engine: a fixed number of slots, bounded, fair, and aware of deadlines.

First come, first served within an account; round robin between accounts. In a full queue, a request of an account with
few requests displaces one of the account with the most, so that a flood from one account never starves another. The
queue runs on the event loop and needs no locks: nothing awaits between a check and a change.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llama2_server.admission.fair_queue import FairQueue
from llama2_server.admission.reservation import Order, Reservation, SlotLease
from llama2_server.admission.retry_times import NEW_CALL, CallIdentity, ExpectedCall, RetryTimes
from llama2_server.admission.wait_estimate import WaitEstimate
from llama2_server.errors import DeadlineExceeded, QueueFull, ShuttingDown

logger = logging.getLogger(__name__)

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
        self._waiting = FairQueue()
        self.retry_times = RetryTimes()
        """The times at which rejected calls are told to return."""
        self.waits = WaitEstimate(slots, self._waiting, self.retry_times)
        self.on_contention: Callable[[], None] = lambda: None  # a request may have to wait, or the queue closes
        self.closed = False
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
        yield GaugeMetricFamily("llama2_mean_slot_time_seconds", mean, self.waits.mean_hold_seconds)

    def reserve(self, account_id: str, deadline: float | None, identity: CallIdentity = NEW_CALL) -> Reservation:
        """Reserve a slot or space in the queue for a request; the caller must `confirm` or `release` it.

        If the queue is full, a request whose account has at least two requests fewer in it than the largest account
        still gets a reservation. When it is confirmed, it displaces the newest request of the largest account.
        A call that returns at its retry time keeps the order of its first try, and is not displaced.

        Args:
            account_id: the request's account.
            deadline: a time of the event loop's clock, or None.
            identity: tells whether the call returns.

        Raises:
            QueueFull: the queue is full.
            QueueWaitTooLong: the wait would exceed the deadline or the queue timeout.
            ShuttingDown: the server is shutting down.
        """
        self.check_open()
        if self._granted + len(self._waiting) >= self._slots:
            self.on_contention()
        returning = self.retry_times.claim(identity, _now())
        displaces = not self._has_space(returning=returning is not None)
        if displaces and not self._waiting.may_displace(account_id, counts_displacing=True):
            raise self._queue_full()
        order = self._waiting.order(account_id, None if returning is None else returning.order)
        reservation = Reservation(account_id, order, displaces=displaces, displaceable=returning is None)
        self._check_wait(order, deadline, returning=returning is not None)
        if displaces:
            self._waiting.start_displacing(account_id)
        else:
            self._waiting.add(reservation)
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
            self._waiting.add(reservation)
        elif reservation.error is not None:
            raise reservation.error
        reservation.confirmed_at = _now()
        self._waiting.make_ready(reservation)
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
            self._waiting.remove(reservation)

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
        self.waits.leases.add(lease)
        try:
            yield lease
        finally:
            self._end_lease(lease, reservation)

    def close(self) -> None:
        """Reject queued and new requests with ShuttingDown; requests that hold a slot finish."""
        self.closed = True
        self.on_contention()
        for reservation in self._waiting.clear():
            reservation.reject(_shutting_down())

    def check_open(self) -> None:
        """Check that the queue is open.

        Raises:
            ShuttingDown: the server is shutting down.
        """
        if self.closed:
            raise _shutting_down()

    def estimated_wait_seconds(self, account_id: str) -> float:
        """Return how long a new request of this account would wait; 0 before the first measurement."""
        order = self._waiting.next_order(account_id)
        return 0.0 if self._occupied() < self._slots else self.waits.until_slot(order, returning=False)

    def expected_calls(self, account_id: str) -> Sequence[float]:
        """Return the sorted times at which rejected calls of an account are told to return; valid until an await."""
        return self.retry_times.of_account(account_id, _now())

    def end_expectation(self, identity: CallIdentity) -> None:
        """Expect a call no longer that returns at its retry time and needs no slot."""
        self.retry_times.claim(identity, _now())

    def add_retry_time(
        self, account_id: str, identity: CallIdentity, earliest_seconds: float, per_minute: int, *, keeps_order: bool
    ) -> float:
        """Return after how many seconds, at least the earliest, a rejected call finds space in the queue.

        `per_minute` is the account's quota. If asked, the call then has the order that it would have now.
        """
        now = _now()
        ahead = self.retry_times.count(account_id, now)
        order = self._waiting.next_order(account_id, ahead) if keeps_order else None
        earliest = now + max(earliest_seconds, self._seconds_until_space())
        call = ExpectedCall(account_id, identity, order)
        return self.retry_times.add(call, earliest, self.waits.spacing_seconds, per_minute, now) - now

    def _check_wait(self, order: Order, deadline: float | None, *, returning: bool) -> None:
        if self._occupied() < self._slots:
            return
        limit_seconds = self._queue_timeout_seconds
        if deadline is not None:
            limit_seconds = min(limit_seconds, deadline - _now())
        self.waits.check(order, limit_seconds, returning=returning)

    def _occupied(self) -> int:
        return self._granted - self.waits.yielding + len(self._waiting)

    def _has_space(self, *, returning: bool = False) -> bool:
        kept = 0 if returning or self._occupied() < self._slots else self.waits.kept_space(self._max_queue_size)
        return self._occupied() < self._slots + self._max_queue_size - kept

    def _seconds_until_space(self) -> float:
        """Return the time until the queue has space for a rejected call, if one generation takes twice the mean."""
        return 0.0 if self._has_space() else self.waits.until_space(self._max_queue_size)

    def _make_space(self, account_id: str) -> None:
        """Displace the newest request of the largest account, unless there is space; raises QueueFull."""
        if self._has_space():
            return
        if not self._waiting.may_displace(account_id, counts_displacing=False):
            raise self._queue_full()
        message = "the request queue is full, and an account with fewer requests in it came first; retry"
        self._waiting.pop_displaced().reject(QueueFull(message, self._seconds_until_space(), displaced=True))

    def _end_displacing(self, reservation: Reservation) -> None:
        reservation.displaces = False
        self._waiting.end_displacing(reservation.account_id)

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
            raise self.waits.too_long(estimate, self._queue_timeout_seconds) from None
        if reservation.error is not None:
            raise reservation.error

    def _queue_full(self) -> QueueFull:
        waiting = len(self._waiting)
        kept = "" if waiting >= self._max_queue_size else ", and the rest is kept for calls that return"
        return QueueFull(f"the request queue is full ({waiting} waiting{kept})", self._seconds_until_space())

    def _report_wait(self, seconds: float) -> None:
        try:
            self._on_waited(seconds)
        except Exception:  # an observer must not change what happens to a slot
            logger.exception("the time in the queue could not be reported")

    def _end_lease(self, lease: SlotLease, reservation: Reservation) -> None:
        """Free the slot of a lease, whatever fails."""
        self.waits.leases.discard(lease)
        try:
            if not lease.unused:
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
        reservation = self._waiting.pop_next()
        if reservation is None:
            return False
        reservation.granted = True
        reservation.decided.set_result(None)
        self._granted += 1
        return True

    def _update_mean_hold(self, hold_seconds: float) -> None:
        self.waits.add_hold(hold_seconds)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the server is shutting down; retry", refunds_quota=True)
