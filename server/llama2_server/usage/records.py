"""What the ledger knows of a request, while it runs and after it has ended."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal

from llama2_server.usage.pricing import TokenUsage, neurons

INTERRUPTED = "INTERRUPTED"
"""The outcome of a request whose server was killed."""
NOTHING_COMPUTED = TokenUsage(0, 0)


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One admitted request that has ended, one way or another; times are aware and in UTC."""

    request_id: str
    account: str
    model: str
    started_at: datetime
    ended_at: datetime
    input_tokens: int
    output_tokens: int
    served_from_cache: bool  # True: the tokens were computed for another request, and are free
    neurons: Decimal
    outcome: str  # a finish reason, a gRPC status code's name, or INTERRUPTED


@dataclass(slots=True)
class RunningRequest:
    """One admitted request that has not ended; its prices are those of the card that admitted it."""

    request_id: str
    account: str
    model: str
    started_at: datetime
    neuron_costs: Mapping[str, Decimal]
    counts: TokenUsage = NOTHING_COMPUTED

    def ended(self, outcome: str, counts: TokenUsage, ended_at: datetime, *, served_from_cache: bool) -> UsageRecord:
        """The request's one record."""
        return UsageRecord(
            self.request_id,
            self.account,
            self.model,
            self.started_at,
            max(ended_at, self.started_at),  # a clock may be set back
            counts.input_tokens,
            counts.output_tokens,
            served_from_cache,
            Decimal(0) if served_from_cache else neurons(counts, self.neuron_costs),
            outcome,
        )


@dataclass(frozen=True, slots=True)
class DailyUsage:
    """One account's requests of one model that started on one day in UTC."""

    account: str
    day: date
    model: str
    requests: int  # those served from the cache included
    cached_requests: int
    input_tokens: int  # computed
    output_tokens: int  # computed
    cached_input_tokens: int
    cached_output_tokens: int
    neurons: Decimal  # exact
