"""The statistics of a reply, as one call sees them."""

from types import SimpleNamespace
from typing import cast

from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason
from llama2_server.generation.generation import Generation
from llama2_server.generation.reply import GeneratedReply
from llama2_server.usage.pricing import TokenUsage

GENERATION = SimpleNamespace(
    joined=False,
    finish_reason=FinishReason.MAX_TOKENS,
    tokens=TokenUsage(3, 5),
    text="Once upon a time",
    params=GenerationParams(max_tokens=5),
    reused_input_tokens=0,
    queued_at=12.0,
    admitted_at=13.0,
    first_token_at=15.0,
    finished_at=18.0,
)


def times(*, started_at: float, shared: bool) -> tuple[float, float, float]:
    """Queue time, time to first token and total time of a call that started at this moment."""
    stats = GeneratedReply(cast(Generation, GENERATION), shared=shared, started_at=started_at).stats()
    return stats.queue_seconds, stats.time_to_first_token_seconds, stats.total_seconds


def test_times_count_from_the_start_of_the_call() -> None:
    """Authentication, validation and stores count for the total times, and not for the queue time."""
    assert times(started_at=10.0, shared=False) == (1.0, 5.0, 8.0)


def test_time_before_a_call_does_not_count_for_it() -> None:
    """A call that joins a generation in progress has waited for the rest of it only."""
    assert times(started_at=12.5, shared=True) == (0.5, 2.5, 5.5)
    assert times(started_at=16.0, shared=True) == (0.0, 0.0, 2.0)
