"""The limits of one account in the API keys file, under `accounts:`."""

from decimal import Decimal
from typing import Annotated, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Field

MAX_NEURONS = 10**9
"""Largest budget; the usage database stores neurons as 64-bit integers of billionths."""

NeuronsPerMonth = Annotated[Decimal, Field(ge=0, le=MAX_NEURONS, decimal_places=9, allow_inf_nan=False)]
RequestsPerMinute = Annotated[int, Field(ge=1, le=1_000_000)]


class AccountLimits(BaseModel):
    """The limits of an account; None leaves the card's quota, or no budget."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: RequestsPerMinute | None = None
    """Requests in any 60 seconds, in place of the card's value."""
    neurons_per_month: NeuronsPerMonth | None = None
    """Budget for one calendar month in UTC."""


NO_LIMITS = AccountLimits()


class LimitsOf(Protocol):
    """Returns the current limits of an account."""

    def __call__(self, account_id: str) -> AccountLimits:
        """Return the limits."""


def entry(account_id: str, limits: AccountLimits) -> str:
    """Return the line of an account for the keys file, without indentation."""
    fields: dict[str, int | str] = {}
    if limits.requests_per_minute is not None:
        fields["requests_per_minute"] = limits.requests_per_minute
    if limits.neurons_per_month is not None:
        fields["neurons_per_month"] = f"{limits.neurons_per_month:f}"  # text, because a float is not exact
    return yaml.safe_dump({account_id: fields}, default_flow_style=None, sort_keys=False, width=1000).strip()
