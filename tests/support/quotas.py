"""Helpers for tests of quotas."""

import asyncio
import time
from collections.abc import Callable

import pytest

from llama2_server.admission.quota import Quota
from llama2_server.card import RequestsPerMinute
from llama2_server.errors import QuotaExceeded

FIVE = RequestsPerMinute(default=5, accounts={"32118455": 60, "small": 1})
CLOCK_CHANGES = [pytest.param(7 * 3600.0, id="forward"), pytest.param(-7 * 3600.0, id="back")]


async def count_allowed(quota: Quota, account: str, attempts: int) -> int:
    """Make concurrent attempts, and return how many are allowed."""
    results = await asyncio.gather(*(quota.consume(account) for _ in range(attempts)), return_exceptions=True)
    rejected = [result for result in results if isinstance(result, BaseException)]
    assert all(isinstance(error, QuotaExceeded) for error in rejected), rejected
    return attempts - len(rejected)


async def retry_after(quota: Quota, account: str = "a") -> float:
    """Make an attempt that is rejected, and return the time until the next allowed one."""
    with pytest.raises(QuotaExceeded) as rejected:
        await quota.consume(account)
    assert rejected.value.retry_after_seconds is not None
    return rejected.value.retry_after_seconds


def change_wall_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Move the wall clock of this process."""
    real: Callable[[], float] = time.time
    real_ns: Callable[[], int] = time.time_ns
    monkeypatch.setattr(time, "time", lambda: real() + seconds)
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + round(seconds * 1e9))
