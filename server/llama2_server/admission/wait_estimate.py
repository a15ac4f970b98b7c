"""How long requests wait: the slots in use, and how long requests have held one."""

import asyncio

from llama2_server.admission.fair_queue import FairQueue
from llama2_server.admission.reservation import Order, SlotLease
from llama2_server.admission.retry_times import RetryTimes
from llama2_server.errors import QueueWaitTooLong

# Weight of the newest hold in the moving average: a change of load shows after a handful of requests.
EMA_ALPHA = 0.3
# The spacing of retry times adds up over many requests, so it needs a mean with less noise.
SLOW_ALPHA = 0.05
MIN_HOLDS = 10
# Calls that return at their retry times use this share of the slots, so that they find space although some generations
# take longer than the mean. New requests use the rest.
RETURNING_SHARE = 1 / 1.4
# New requests that have so little of the slots wait much longer than estimated if a few generations are long.
NEW_REQUEST_MARGIN = 3
ROUNDS = 16
# Space for calls that return at their retry times, as long as some do: this number, or a quarter of the queue.
MIN_KEPT_SPACE = 4


class WaitEstimate:
    """Estimates from the leases in progress and the moving averages of their durations, 0 before the first one ends."""

    def __init__(self, slots: int, waiting: FairQueue, retry_times: RetryTimes) -> None:
        self._slots = slots
        self._waiting = waiting
        self._retry_times = retry_times
        self.leases: set[SlotLease] = set()
        """The slots in use."""
        self.mean_hold_seconds = 0.0
        self.expected_hold_seconds = 0.0
        """The least duration of a lease for retry times until `MIN_HOLDS` have ended: the first ones may be short."""
        self._slow_mean_seconds = 0.0
        self._holds = 0

    @property
    def seconds_per_request(self) -> float:
        """The mean time between two requests that get a slot."""
        return self._at_least_expected(self._slow_mean_seconds) / self._slots

    @property
    def spacing_seconds(self) -> float:
        """The time between two retry times."""
        return self.seconds_per_request / RETURNING_SHARE

    @property
    def yielding(self) -> int:
        """The number of slots in use that another request gets within one step."""
        return sum(lease.yields for lease in self.leases)

    def add_hold(self, seconds: float) -> None:
        """Add the duration of a lease to the averages."""
        self._holds += 1
        self.mean_hold_seconds += max(EMA_ALPHA, float(self._holds == 1)) * (seconds - self.mean_hold_seconds)
        self._slow_mean_seconds += max(SLOW_ALPHA, 1 / self._holds) * (seconds - self._slow_mean_seconds)

    def seconds_until_slot(self, position: int) -> float:
        """Return the wait of a request with `position` requests in front of it."""
        mean, now = self.mean_hold_seconds, asyncio.get_running_loop().time()
        ends = (now if lease.yields else lease.started_at + mean for lease in self.leases)
        remaining = sorted(max(0.0, end - now) for end in ends)
        remaining += [mean] * (self._slots - len(remaining))
        # No slot is free later than one mean from now: the slots become free in the same order in each round.
        return remaining[position % self._slots] + position // self._slots * mean

    def until_slot(self, order: Order, *, returning: bool) -> float:
        """Return the wait of a request with this order; calls that return during its wait are before a new request."""
        position = self._waiting.position(order)
        estimate = self.seconds_until_slot(position)
        if returning or len(self._waiting) < self._slots:  # so that a slot never waits for a call that may not return
            return estimate
        now = asyncio.get_running_loop().time()
        for _ in range(ROUNDS):
            longer = self.seconds_until_slot(position + self._retry_times.until(now + estimate, now))
            if longer == estimate:
                break
            estimate = longer
        return estimate

    def check(self, order: Order, limit_seconds: float, *, returning: bool) -> None:
        """Check that a request with this order gets a slot in time.

        Raises:
            QueueWaitTooLong: it may not.
        """
        estimate, now = self.until_slot(order, returning=returning), asyncio.get_running_loop().time()
        uncertain = not returning and len(self._waiting) >= self._slots
        uncertain = uncertain and self._retry_times.until(now + limit_seconds, now) > 0
        if estimate * (NEW_REQUEST_MARGIN if uncertain else 1) > limit_seconds:
            raise self.too_long(estimate, limit_seconds)

    def too_long(self, estimate: float, limit_seconds: float) -> QueueWaitTooLong:
        """Return the error of a request with this estimate; its retry time allows one generation twice the mean."""
        message = f"the estimated wait is {estimate:.1f} s, and this call can wait {max(0.0, limit_seconds):.1f} s"
        retry_after = estimate / RETURNING_SHARE + self.mean_hold_seconds - limit_seconds
        return QueueWaitTooLong(message, max(retry_after, 0.0))

    def kept_space(self, max_queue_size: int) -> int:
        """Return the space of the queue that is kept for calls that return before it would be free otherwise."""
        most = min(max_queue_size, max(MIN_KEPT_SPACE, max_queue_size // 4))
        now = asyncio.get_running_loop().time()
        return min(most, self._retry_times.until(now + 2 * most * self.seconds_per_request, now))

    def until_space(self, max_queue_size: int) -> float:
        """Return the time until a full queue has space for a rejected call, if one generation takes twice the mean."""
        hold_seconds = self._at_least_expected(self.mean_hold_seconds)
        return self.seconds_until_slot(self.kept_space(max_queue_size) // 2) + hold_seconds

    def _at_least_expected(self, mean_seconds: float) -> float:
        return mean_seconds if self._holds >= MIN_HOLDS else max(mean_seconds, self.expected_hold_seconds)
