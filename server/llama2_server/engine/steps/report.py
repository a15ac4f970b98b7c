"""The engine's report about each step."""

from dataclasses import dataclass
from enum import StrEnum


class StepPhase(StrEnum):
    """The content of a step; the label of the metrics."""

    PREFILL = "prefill"
    """A part of one prompt."""
    DECODE = "decode"
    """Tokens of all decoding sequences."""
    MIXED = "mixed"
    """Both."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """A finished step."""

    phase: StepPhase
    seconds: float
    rows: int
    """Prompt tokens, one token of each decoding sequence, and guesses."""
    proposed: int = 0
    """Guesses that the step checked."""
    accepted: int = 0
    """Guesses that became tokens of a reply."""
