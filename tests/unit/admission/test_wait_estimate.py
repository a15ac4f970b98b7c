"""The averages of the durations of leases, against their definitions."""

from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.virtual_time import run_virtual

from llama2_server.admission.fair_queue import FairQueue
from llama2_server.admission.retry_times import CallIdentity, ExpectedCall, RetryTimes
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


def test_space_is_free_after_half_of_the_kept_one() -> None:
    """Half of the calls that space is kept for are served, and then one that takes twice the mean."""

    async def main() -> None:
        times = RetryTimes()
        waits = WaitEstimate(1, FairQueue(), times)
        for _ in range(MIN_HOLDS):
            waits.add_hold(10)
        assert waits.until_space(20) == pytest.approx(10 + 10)
        for key in range(4):
            times.add(ExpectedCall("acme", CallIdentity(key), None), 0, 1, 100, 0)
        assert waits.kept_space(20) == 4
        assert waits.until_space(20) == pytest.approx(10 + 2 * 10 + 10)

    run_virtual(main())
