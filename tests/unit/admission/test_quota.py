"""Requests per minute in memory, in virtual time."""

import asyncio
from unittest.mock import ANY

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.quotas import CLOCK_CHANGES, FIVE, change_wall_clock, count_allowed, retry_after
from tests.support.virtual_time import run_virtual

from llama2_server.admission.quota import Quota, QuotaStatus
from llama2_server.card import RequestsPerMinute
from llama2_server.errors import QuotaExceeded


def test_sixth_request_is_rejected_until_the_exact_time() -> None:
    """With a quota of 5, the sixth request is rejected with the time to wait, which is exact to the microsecond."""

    async def main() -> None:
        quota = Quota(FIVE)
        for pause in (0, 1, 1, 1, 1):
            await asyncio.sleep(pause)
            assert await quota.retry_seconds("a") == 0
            await quota.consume("a")
        assert await retry_after(quota) == 56
        await asyncio.sleep(56 - 1e-6)
        assert await retry_after(quota) == 1e-6
        await asyncio.sleep(1e-6)
        await quota.consume("a")
        assert await retry_after(quota) == 1

    run_virtual(main())


def test_rejections_cost_nothing() -> None:
    """Rejected attempts do not change the time of the next allowed request."""

    async def main() -> None:
        quota = Quota(FIVE)
        assert await count_allowed(quota, "a", 5) == 5
        for _ in range(30):
            await retry_after(quota)
            await asyncio.sleep(1)
        assert await retry_after(quota) == 30

    run_virtual(main())


def test_accounts_have_separate_limits() -> None:
    """An account has its limit from the card, also if its id is a number, or the default; accounts are independent."""

    async def main() -> None:
        quota = Quota(RequestsPerMinute.model_validate({"default": 5, "accounts": {32118455: 60}}))
        assert await count_allowed(quota, "a", 100) == 5
        assert await count_allowed(quota, "32118455", 100) == 60
        assert await count_allowed(quota, "b", 100) == 5

    run_virtual(main())


def test_rejection_names_account_and_limit() -> None:
    """The error names the account and its limit."""

    async def main() -> None:
        quota = Quota(FIVE)
        await quota.consume("small")
        with pytest.raises(QuotaExceeded, match=r"^account small has used up its quota of 1 requests per minute$"):
            await quota.consume("small")

    run_virtual(main())


def test_status_counts_nothing() -> None:
    """The status has the remaining requests and the time until all are available, and costs no quota."""

    async def main() -> None:
        quota = Quota(FIVE)
        assert await quota.status("a") == QuotaStatus(5, 5, 0)
        await quota.consume("a")
        await asyncio.sleep(10)
        await quota.consume("a")
        await asyncio.sleep(20)
        for _ in range(10):
            assert await quota.status("a") == QuotaStatus(5, 3, 40)
        assert (quota.store_up, quota.store_errors) == (True, 0)

    run_virtual(main())


@settings(max_examples=50, deadline=None)
@given(
    pauses=st.lists(st.floats(0, 40), max_size=60),
    limit=st.integers(1, 7),
)
def test_no_window_exceeds_the_limit(pauses: list[float], limit: int) -> None:
    """For any arrivals, no 60 seconds have more than the limit, and a client that waits as long as told is allowed."""

    async def main() -> None:
        quota, allowed_at = Quota(RequestsPerMinute(default=limit)), []
        for pause in pauses:
            await asyncio.sleep(pause)
            try:
                await quota.consume("a")
            except QuotaExceeded as rejected:
                await asyncio.sleep(rejected.retry_after_seconds or 0)
                await quota.consume("a")
            allowed_at.append(asyncio.get_running_loop().time())
        for first, last in zip(allowed_at, allowed_at[limit:], strict=False):
            assert last - first > 60 - 2e-6  # times are whole microseconds

    run_virtual(main())


@settings(max_examples=200, deadline=None)
@given(
    consumed=st.lists(st.integers(0, 59), max_size=8),
    expected=st.lists(st.integers(-1, 59), max_size=8),
    limit=st.integers(1, 8),
)
def test_units_are_kept_for_expected_calls(consumed: list[int], expected: list[int], limit: int) -> None:
    """A request is allowed if and only if the quota then also allows each expected call at its time."""
    times = sorted(consumed)[:limit]
    expected = sorted(expected)

    def all_allowed() -> bool:
        window: list[float] = [*times, 60]
        for at in (max(60, 60 + seconds) + 0.001 for seconds in expected):
            window.append(at)
            if sum(at - 60 < one for one in window) > limit:
                return False
        return sum(one > 0 for one in window[: len(times) + 1]) <= limit

    async def main() -> None:
        quota = Quota(RequestsPerMinute(default=limit))
        for at in times:
            await asyncio.sleep(at - asyncio.get_running_loop().time())
            await quota.consume("a")
        await asyncio.sleep(60 - asyncio.get_running_loop().time())
        quota.expected_calls = lambda account_id: [60.0 + seconds for seconds in expected]
        assert await quota.status("a") == QuotaStatus(limit, limit - sum(one > 0 for one in times), ANY)
        assert await count_allowed(quota, "a", 1) == int(all_allowed())

    run_virtual(main())


@pytest.mark.parametrize("seconds", CLOCK_CHANGES)
def test_wall_clock_change_has_no_effect(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the wall clock by hours, forward or back, neither allows nor rejects a request."""

    async def main() -> None:
        quota = Quota(FIVE)
        assert await count_allowed(quota, "a", 100) == 5
        change_wall_clock(monkeypatch, seconds)
        assert await retry_after(quota) == 60
        await asyncio.sleep(60)
        assert await count_allowed(quota, "a", 100) == 5

    run_virtual(main())
