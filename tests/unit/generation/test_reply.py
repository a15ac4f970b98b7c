"""The figures of a reply, as one call sees them."""

from types import SimpleNamespace
from typing import cast

from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason
from llama2_server.generation.generation import Generation
from llama2_server.generation.reply import GeneratedReply
from llama2_server.usage.pricing import TokenUsage

GENERATION = SimpleNamespace(
    finish_reason=FinishReason.MAX_TOKENS,
    counts=TokenUsage(3, 5),
    params=GenerationParams(max_tokens=5),
    reused_input_tokens=0,
    queued_at=12.0,
    admitted_at=13.0,
    first_token_at=15.0,
    finished_at=18.0,
)


def times(begun: float, *, shared: bool) -> tuple[float, float, float]:
    """Queue time, time to first token and total time of a call that began then."""
    figures = GeneratedReply(cast(Generation, GENERATION), shared=shared, begun=begun).figures()
    return figures.queue_seconds, figures.time_to_first_token_seconds, figures.total_seconds


def test_times_count_from_the_moment_the_request_was_read() -> None:
    """What comes before the line (keys, validation, stores) is in the times, and no wait for a slot."""
    assert times(begun=10.0, shared=False) == (1.0, 5.0, 8.0)


def test_what_happened_before_a_call_took_it_no_time() -> None:
    """A call that joins a generation under way waited for the rest of it only."""
    assert times(begun=12.5, shared=True) == (0.5, 2.5, 5.5)
    assert times(begun=16.0, shared=True) == (0.0, 0.0, 2.0)
