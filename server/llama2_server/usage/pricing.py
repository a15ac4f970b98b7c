"""Tokens to neurons, by the card's prices, in exact decimal arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """What was computed for one request; an end-of-sequence token counts."""

    input_tokens: int
    output_tokens: int


def neurons(counts: TokenUsage, neuron_costs: Mapping[str, Decimal]) -> Decimal:
    """The price of the tokens; a metric that the card does not price is free."""
    return counts.input_tokens * neuron_costs.get("input_tokens", Decimal(0)) + counts.output_tokens * neuron_costs.get(
        "output_tokens", Decimal(0)
    )


def decimal_text(number: Decimal) -> str:
    """Plain notation without trailing zeros: 12.1176, never 1.21176E+1."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
