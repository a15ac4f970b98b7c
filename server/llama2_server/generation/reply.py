"""A reply as one call sees it: its text, and its statistics."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from llama2_server.engine.sequence import FinishReason
from llama2_server.generation.generation import Generation
from llama2_server.generation.response_cache import CacheEntry
from llama2_server.usage.pricing import TokenUsage


@dataclass(frozen=True, slots=True)
class ReplyStats:
    """Finish reason, tokens, text and times of a reply; times are seconds since the call started."""

    finish_reason: FinishReason
    tokens: TokenUsage
    text: str
    """The whole text."""
    seed: int
    cached: bool
    """Whether the reply was computed for another call; its tokens are then free."""
    queue_seconds: float
    time_to_first_token_seconds: float
    total_seconds: float
    reused_input_tokens: int = 0
    """Input tokens reused from the KV cache."""


class Reply(Protocol):
    """The text and the statistics that one call sends to its client."""

    def deltas(self) -> AsyncIterator[str]:
        """Yield the text while it is generated; raises ServiceError if the reply fails."""

    def stats(self) -> ReplyStats:
        """Return the statistics; only after `deltas` has ended."""


class GeneratedReply:
    """The reply of a generation that this call started, or `shared` with the call that did, also on another replica.

    `started_at` is when this call started, from time.monotonic.
    """

    def __init__(self, generation: Generation, *, shared: bool, started_at: float) -> None:
        self._generation = generation
        self._shared = shared
        self._started_at = started_at

    def deltas(self) -> AsyncIterator[str]:
        """Yield the generation's text from its start."""
        return self._generation.deltas()

    def stats(self) -> ReplyStats:
        """Return the statistics; time before this call started does not count.

        Raises:
            RuntimeError: the reply is not complete.
        """
        generation = self._generation
        shared = self._shared or generation.joined
        if generation.finish_reason is None:
            raise RuntimeError("the reply is not complete")
        return ReplyStats(
            generation.finish_reason,
            generation.tokens,
            generation.text,
            generation.params.seed,
            cached=shared,
            queue_seconds=max(0.0, generation.admitted_at - max(self._started_at, generation.queued_at)),
            time_to_first_token_seconds=self._seconds_until(generation.first_token_at),
            total_seconds=self._seconds_until(generation.finished_at),
            reused_input_tokens=0 if shared else generation.reused_input_tokens,
        )

    def _seconds_until(self, moment: float) -> float:
        return max(0.0, moment - self._started_at)


class CachedReply:
    """The complete reply of an earlier call, which costs nothing; its text is one delta."""

    def __init__(self, entry: CacheEntry) -> None:
        self._entry = entry

    async def deltas(self) -> AsyncIterator[str]:
        """Yield the whole text at once."""
        if self._entry.text:
            yield self._entry.text

    def stats(self) -> ReplyStats:
        """Return the statistics of the cached reply, with times of zero."""
        entry = self._entry
        tokens = TokenUsage(entry.input_tokens, entry.output_tokens)
        finish_reason = FinishReason[entry.finish_reason]
        return ReplyStats(finish_reason, tokens, entry.text, entry.seed, True, 0.0, 0.0, 0.0)


class RecordedReply:
    """A reply whose usage record is durable before its deltas end, and so before the last message of the call."""

    def __init__(self, reply: Reply, complete: Callable[[], Awaitable[None]]) -> None:
        self.reply = reply
        """The reply without its record."""
        self._complete = complete

    async def deltas(self) -> AsyncIterator[str]:
        """Yield the text, then wait for the record."""
        async for delta in self.reply.deltas():
            yield delta
        await self._complete()

    def stats(self) -> ReplyStats:
        """Return the statistics."""
        return self.reply.stats()
