"""The limits of calls that generate nothing, in virtual time."""

import asyncio

import pytest
from tests.support.virtual_time import run_virtual

from llama2_server.admission.call_budget import PRUNE_BUCKETS, CallBudget, TokenBuckets
from llama2_server.errors import TooManyRequests


def rejected_seconds(budget: CallBudget, account_id: str) -> float | None:
    """Return the retry time of the account's next call; None if the call is allowed."""
    try:
        budget.check(account_id)
    except TooManyRequests as error:
        return error.retry_after_seconds
    return None


def test_an_empty_bucket_rejects_until_the_exact_time() -> None:
    """After 6 calls at 6 per minute, the next one is allowed after 10 s, and not before."""

    async def main() -> None:
        budget = CallBudget(6, 1)
        for _ in range(6):
            assert rejected_seconds(budget, "a") is None
            budget.spend("a")
        assert rejected_seconds(budget, "a") == pytest.approx(10)
        await asyncio.sleep(9.99)
        assert rejected_seconds(budget, "a") == pytest.approx(0.01)
        await asyncio.sleep(0.01)
        assert rejected_seconds(budget, "a") is None

    run_virtual(main())


def test_the_bucket_never_holds_more_than_a_minute() -> None:
    """An hour without calls gives no more than one minute's calls at once."""

    async def main() -> None:
        budget = CallBudget(6, 1)
        await asyncio.sleep(3600)
        for _ in range(6):
            assert rejected_seconds(budget, "a") is None
            budget.spend("a")
        assert rejected_seconds(budget, "a") is not None

    run_virtual(main())


def test_accounts_have_separate_buckets() -> None:
    """Neither another account nor calls without a key reject an account's call."""

    async def main() -> None:
        budget = CallBudget(1, 1)
        budget.spend("a")
        budget.take_keyless()
        with pytest.raises(TooManyRequests, match="without a valid API key"):
            budget.take_keyless()
        assert rejected_seconds(budget, "a") == pytest.approx(60)
        assert rejected_seconds(budget, "b") is None

    run_virtual(main())


def test_full_buckets_take_no_memory() -> None:
    """Buckets of accounts that stopped calling are dropped; one with missing tokens is kept."""

    async def main() -> None:
        buckets = TokenBuckets(6)
        for index in range(PRUNE_BUCKETS):
            buckets.take(f"account{index}")
        await asyncio.sleep(11)
        for _ in range(6):
            buckets.take("a")
        assert len(buckets) == 1
        assert buckets.wait_seconds("a") == pytest.approx(10)

    run_virtual(main())
