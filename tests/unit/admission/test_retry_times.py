"""The times at which rejected calls are told to return, one by one."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2_server.admission.retry_times import EXPIRY_SECONDS, MAX_MINUTES, CallIdentity, ExpectedCall, RetryTimes

NOW = 100.0


def call(key: int, account_id: str = "acme", client: str = "") -> ExpectedCall:
    return ExpectedCall(account_id, CallIdentity(key, client), None)


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0.1, 10)), min_size=1, max_size=30))
def test_times_keep_their_distance(wanted: list[tuple[float, float]]) -> None:
    """A call never returns before its earliest time, nor in the time that another call has for itself."""
    times = RetryTimes()
    found = [
        (times.add(call(key), NOW + earliest, spacing, 1000, NOW), NOW + earliest, spacing)
        for key, (earliest, spacing) in enumerate(wanted)
    ]
    assert all(at >= earliest for at, earliest, _ in found)
    ends = sorted((at, at + spacing) for at, _, spacing in found)
    assert all(end <= begin + 1e-9 for (_, end), (begin, _) in pairwise(ends))


@pytest.mark.parametrize("per_minute", [1, 3])
def test_an_account_counts_for_a_few_minutes_of_its_quota(per_minute: int) -> None:
    """More calls get times, too, but nothing is kept for them."""
    times, most = RetryTimes(), MAX_MINUTES * per_minute
    for key in range(most + 2):
        times.add(call(key), NOW, 1.0, per_minute, NOW)
    assert times.count("acme", NOW) == times.until(NOW + 1000, NOW) == most
    times.add(call(1000, "other"), NOW, 1.0, per_minute, NOW)
    assert (times.count("acme", NOW), times.count("other", NOW)) == (most, 1)
    assert list(times.of_account("other", NOW)) == [NOW + most + 2]


def test_a_time_expires() -> None:
    """A call counts for a while after its time, and no longer."""
    times = RetryTimes()
    at = times.add(call(1, client="c"), NOW, 1.0, 5, NOW)
    assert times.of_call(1, at - 1) == at
    assert times.of_call(1, at) is None
    assert times.count("acme", at + EXPIRY_SECONDS) == 1
    assert times.count("acme", at + EXPIRY_SECONDS + 0.001) == 0
    assert times.claim(call(1, client="c").identity, at + EXPIRY_SECONDS + 0.001) is None
    at = times.add(call(1), NOW + 50, 1.0, 5, NOW + 50)
    assert times.until(at, at + EXPIRY_SECONDS) == 1
    assert times.until(at, at + EXPIRY_SECONDS + 0.001) == 0
    at = times.add(call(1), NOW + 100, 1.0, 5, NOW + 100)
    assert list(times.of_account("acme", at + EXPIRY_SECONDS)) == [at]
    assert list(times.of_account("acme", at + EXPIRY_SECONDS + 0.001)) == []


def test_the_due_call_is_claimed_once() -> None:
    """An equal call comes first, then another one of the same client; neither before its time."""
    times = RetryTimes()
    first, second, third = call(1, client="a"), call(2, client="a"), call(3, client="b")
    ats = [times.add(one, NOW, 1.0, 5, NOW) for one in (first, second, third)]
    assert ats == [NOW, NOW + 1, NOW + 2]
    assert times.claim(CallIdentity(2, "a"), NOW) == first  # the equal call is not due yet
    assert times.claim(CallIdentity(2, "a"), NOW) is None
    assert times.claim(CallIdentity(9, "b"), NOW + 1.5) is None
    assert times.claim(CallIdentity(2, "c"), NOW + 1.5) == second
    assert times.claim(CallIdentity(9), NOW + 2) is None  # its client is not known
    assert times.claim(CallIdentity(9, "b"), NOW + 2) == third
    assert times.until(NOW + 1000, NOW + 2) == 0
