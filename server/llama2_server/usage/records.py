"""Usage of one request, while it runs and after it has finished, and totals per day."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal

from llama2_server.usage.pricing import ZERO_TOKENS, TokenUsage, neurons

INTERRUPTED = "INTERRUPTED"
"""Outcome of a request whose server was killed."""
COMPLETE = ("END_OF_SEQUENCE", "STOP_SEQUENCE", "MAX_TOKENS")
"""Outcomes of complete replies: their finish reasons."""


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """Usage of one admitted request that has finished, with or without success; times are aware and in UTC."""

    request_id: str
    account_id: str
    model: str
    started_at: datetime
    finished_at: datetime
    input_tokens: int
    output_tokens: int
    cached: bool  # True: the tokens were computed for another request, and are free
    neurons: Decimal
    outcome: str  # a finish reason, a gRPC status code's name, or INTERRUPTED


@dataclass(slots=True)
class RunningRequest:
    """One admitted request that has not finished; its prices are from the card that was active at admission."""

    request_id: str
    account_id: str
    model: str
    started_at: datetime
    neuron_costs: Mapping[str, Decimal]
    tokens: TokenUsage = ZERO_TOKENS
    admitted: bool = False
    """Whether the request gets a record; before, it is only reserved."""
    reserved_in_store: bool = False
    """Whether the usage store may have a reservation in the account's budget."""

    def finish(self, outcome: str, tokens: TokenUsage, finished_at: datetime, *, cached: bool) -> UsageRecord:
        """Return the request's usage record."""
        return UsageRecord(
            self.request_id,
            self.account_id,
            self.model,
            self.started_at,
            max(finished_at, self.started_at),  # the system clock may have been set back
            tokens.input_tokens,
            tokens.output_tokens,
            cached,
            Decimal(0) if cached else neurons(tokens, self.neuron_costs),
            outcome,
        )


@dataclass(frozen=True, slots=True)
class DailyUsage:
    """Total usage of one account and one model by requests that started on one day in UTC; add several with `+`."""

    account_id: str
    day: date
    model: str
    requests: int  # cached requests included
    cached_requests: int
    input_tokens: int  # computed
    output_tokens: int  # computed
    cached_input_tokens: int
    cached_output_tokens: int
    neurons: Decimal  # exact

    @classmethod
    def of(cls, record: UsageRecord) -> "DailyUsage":
        """Return the usage of one record."""
        tokens = (record.input_tokens, record.output_tokens)
        computed, cached = ((0, 0), tokens) if record.cached else (tokens, (0, 0))
        day = record.started_at.astimezone(UTC).date()
        return cls(
            record.account_id, day, record.model, 1, int(record.cached), *computed, *cached, neurons=record.neurons
        )

    def __add__(self, other: "DailyUsage") -> "DailyUsage":
        return DailyUsage(
            self.account_id,
            self.day,
            self.model,
            self.requests + other.requests,
            self.cached_requests + other.cached_requests,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_input_tokens + other.cached_input_tokens,
            self.cached_output_tokens + other.cached_output_tokens,
            self.neurons + other.neurons,
        )


def sum_by_day(usages: Iterable[DailyUsage]) -> list[DailyUsage]:
    """Return one sum per account, day and model, in this order."""
    sums: dict[tuple[str, date, str], DailyUsage] = {}
    for usage in usages:
        key = (usage.account_id, usage.day, usage.model)
        sums[key] = sums[key] + usage if key in sums else usage
    return [sums[key] for key in sorted(sums)]
