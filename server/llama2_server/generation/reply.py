"""What a call answers with: a generation's text, or a cached one's, and the figures of this call."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from llama2_server.engine.sequence import FinishReason
from llama2_server.generation.generation import Generation
from llama2_server.generation.response_cache import CacheEntry
from llama2_server.usage.pricing import TokenUsage


@dataclass(frozen=True, slots=True)
class Figures:
    """How a reply ended and what it took; times are seconds since the call began."""

    finish_reason: FinishReason
    counts: TokenUsage
    seed: int
    cached: bool
    """Whether it was computed for another call: then its tokens are free."""
    queue_seconds: float
    time_to_first_token_seconds: float
    total_seconds: float
    reused_input_tokens: int = 0
    """Those of the input tokens that were not computed anew for this call."""


class Reply(Protocol):
    """A reply as one call sees it."""

    def deltas(self) -> AsyncIterator[str]:
        """The text as it comes; raises ServiceError if the reply fails."""

    def figures(self) -> Figures:
        """The figures, once `deltas` has ended."""


class GeneratedReply:
    """A generation's reply, begun by this call or `shared` with the one that began it.

    `begun` is when this call's request was read, by time.monotonic.
    """

    def __init__(self, generation: Generation, *, shared: bool, begun: float) -> None:
        self._generation = generation
        self._shared = shared
        self._begun = begun

    def deltas(self) -> AsyncIterator[str]:
        """See Reply."""
        return self._generation.deltas()

    def figures(self) -> Figures:
        """See Reply; what happened before this call came took it no time."""
        generation = self._generation
        if generation.finish_reason is None:
            raise RuntimeError("the reply is not complete")
        return Figures(
            generation.finish_reason,
            generation.counts,
            generation.params.seed,
            cached=self._shared,
            queue_seconds=max(0.0, generation.admitted_at - max(self._begun, generation.queued_at)),
            time_to_first_token_seconds=self._since_begun(generation.first_token_at),
            total_seconds=self._since_begun(generation.finished_at),
            reused_input_tokens=0 if self._shared else generation.reused_input_tokens,
        )

    def _since_begun(self, moment: float) -> float:
        return max(0.0, moment - self._begun)


class CachedReply:
    """A reply out of the response cache."""

    def __init__(self, cached: CacheEntry) -> None:
        self._cached = cached

    async def deltas(self) -> AsyncIterator[str]:
        """See Reply; all of it comes at once."""
        if self._cached.text:
            yield self._cached.text

    def figures(self) -> Figures:
        """See Reply; it took no time worth telling."""
        cached = self._cached
        counts = TokenUsage(cached.input_tokens, cached.output_tokens)
        return Figures(FinishReason[cached.finish_reason], counts, cached.seed, True, 0.0, 0.0, 0.0)
