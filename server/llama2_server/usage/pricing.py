"""Token counts and their price in neurons, in exact decimal arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Tokens computed for one request; an end-of-sequence token counts."""

    input_tokens: int
    output_tokens: int


ZERO_TOKENS = TokenUsage(0, 0)


def neurons(tokens: TokenUsage, neuron_costs: Mapping[str, Decimal]) -> Decimal:
    """Return the price of the tokens; a metric without a price on the card is free."""
    return tokens.input_tokens * neuron_costs.get("input_tokens", Decimal(0)) + tokens.output_tokens * neuron_costs.get(
        "output_tokens", Decimal(0)
    )


def decimal_text(number: Decimal) -> str:
    """Format a number in plain notation without trailing zeros: 12.1176, never 1.21176E+1."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
