"""The averages of the durations of leases, against their definitions."""

from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2_server.admission.fair_queue import FairQueue
from llama2_server.admission.retry_times import RetryTimes
from llama2_server.admission.wait_estimate import EMA_ALPHA, MIN_HOLDS, RETURNING_SHARE, SLOW_ALPHA, WaitEstimate

SECONDS = st.floats(0.01, 1000)


@given(st.lists(SECONDS, min_size=MIN_HOLDS, max_size=round(1 / SLOW_ALPHA)), st.integers(1, 8))
def test_retry_times_use_the_mean_of_all_leases(holds: list[float], slots: int) -> None:
    """The slow average is the plain mean as long as the number of leases is small."""
    waits = WaitEstimate(slots, FairQueue(), RetryTimes())
    for seconds in holds:
        waits.add_hold(seconds)
    assert waits.seconds_per_request == pytest.approx(mean(holds) / slots)
    assert waits.spacing_seconds == pytest.approx(mean(holds) / slots / RETURNING_SHARE)


@given(SECONDS, SECONDS)
def test_later_leases_move_the_averages_by_a_fixed_share(first: float, later: float) -> None:
    """The fast average moves from the second lease on, the slow one after many."""
    waits = WaitEstimate(1, FairQueue(), RetryTimes())
    many = 10 * round(1 / SLOW_ALPHA)
    for _ in range(many):
        waits.add_hold(first)
    assert [waits.mean_hold_seconds, waits.seconds_per_request] == pytest.approx([first, first])
    waits.add_hold(later)
    assert waits.mean_hold_seconds == pytest.approx((1 - EMA_ALPHA) * first + EMA_ALPHA * later)
    assert waits.seconds_per_request == pytest.approx((1 - SLOW_ALPHA) * first + SLOW_ALPHA * later)
