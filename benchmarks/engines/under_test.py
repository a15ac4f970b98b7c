"""The interface of an engine under test: another process that continues prompts and reports its times."""

from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.prompts import Prompt


class SkippedPeer(Exception):
    """A peer cannot run on this machine; the message gives the reason."""


@dataclass(frozen=True)
class TimedRun:
    """The times and replies of one generation of all prompts at once."""

    output_tokens: int  # of all replies
    first_token_seconds: float  # until every reply has its first token
    total_seconds: float
    token_ids: list[list[int]] | None = None
    texts: list[str] | None = None


class EngineUnderTest(Protocol):
    """A process that continues prompts."""

    @property
    def process_id(self) -> int:
        """The id of the process that computes, or of its ancestor."""

    def generate(self, prompts: list[Prompt], tokens: int, seed: int | None) -> TimedRun:
        """Continue prompts of equal length, all at once, by `tokens` tokens each; without a seed greedily."""

    def describe(self) -> dict[str, Any]:
        """Return its arithmetic and the versions of its libraries."""

    def close(self) -> None:
        """Stop its processes."""
