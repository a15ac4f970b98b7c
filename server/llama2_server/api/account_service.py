"""AccountService: the usage and the quota of the calling account."""

import re
from datetime import UTC, date, datetime, timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration

from llama2.v1 import account_pb2, account_pb2_grpc
from llama2_server.admission.accounts import Authenticator
from llama2_server.admission.quota import Quota
from llama2_server.errors import InvalidRequest, Violation
from llama2_server.telemetry.call import CALL
from llama2_server.usage.budgets.budget import BudgetState
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import decimal_text
from llama2_server.usage.records import DailyUsage

DEFAULT_DAYS = timedelta(days=30)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


class AccountServicer(account_pb2_grpc.AccountServiceServicer):
    """Serves the usage and the quota of the calling account."""

    def __init__(self, authenticator: Authenticator, quota: Quota, ledger: Ledger) -> None:
        self._authenticator = authenticator
        self._quota = quota
        self._ledger = ledger

    async def GetUsage(self, request: account_pb2.GetUsageRequest, context: Any) -> account_pb2.GetUsageResponse:
        """Return the account's usage by day and model, and the state of its quota and its budget."""
        account = self._authenticator.authenticate(context.invocation_metadata())
        CALL.get().account_id = account.id
        since, until = _days(request)
        status = await self._quota.status(account.id)
        quota = account_pb2.QuotaState(
            max_requests_per_min=status.limit,
            requests_left=status.remaining,
            resets_in=_duration(status.resets_in_seconds),
        )
        days = await self._ledger.totals(account.id, since, until)
        budget = await self._ledger.budget(account.id)
        return account_pb2.GetUsageResponse(
            account=account.id,
            quota=quota,
            days=map(_day_message, days),
            budget=None if budget is None else _budget_message(budget),
        )


def _days(request: account_pb2.GetUsageRequest) -> tuple[date, date]:
    """Return the first and the last day of the requested range.

    Raises:
        InvalidRequest: a date is not valid, or the range is reversed.
    """
    violations: list[Violation] = []

    def day(field: str, default: date) -> date:
        text = getattr(request, field)
        if not request.HasField(field):
            return default
        try:
            return date.fromisoformat(text if _DATE.fullmatch(text) else "")
        except ValueError:
            violations.append(Violation(field, "must be a date such as 2026-11-22"))
            return default

    until = day("until", datetime.now(UTC).date())
    since = day("since", until - min(DEFAULT_DAYS, until - date.min))
    if not violations and since > until:
        violations.append(Violation("since", "must not be after until"))
    if violations:
        raise InvalidRequest(violations)
    return since, until


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _budget_message(budget: BudgetState) -> account_pb2.BudgetState:
    return account_pb2.BudgetState(
        neurons_per_month=decimal_text(budget.neurons_per_month),
        neurons_spent=decimal_text(budget.use.spent),
        neurons_reserved=decimal_text(budget.use.reserved),
        resets_in=_duration(budget.resets_in_seconds),
    )


def _day_message(usage: DailyUsage) -> account_pb2.DailyUsage:
    return account_pb2.DailyUsage(
        date=usage.day.isoformat(),
        model=usage.model,
        requests=usage.requests,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cached_tokens=usage.cached_input_tokens + usage.cached_output_tokens,
        neurons=decimal_text(usage.neurons),
    )
