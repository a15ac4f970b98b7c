"""The sequences that hold a slot: their admission, their tokens and their end."""

import logging
from collections import deque
from collections.abc import Iterator

import torch

from llama2_server.engine.errors import SequenceError
from llama2_server.engine.prefix_cache import PrefixCache
from llama2_server.engine.sequence import FinishReason, Sequence, SequenceResult, TokenOrError

logger = logging.getLogger(__name__)


class RunningSequences:
    """The running sequences in the order of their admission; only the engine's thread may use them.

    Args:
        prefix_cache: the slots.
        eos_ids: token ids that end a sequence.
        reuse_replies: whether later prompts may reuse the keys and values of generated tokens, too.
    """

    def __init__(self, prefix_cache: PrefixCache, eos_ids: frozenset[int], *, reuse_replies: bool) -> None:
        self._prefix_cache = prefix_cache
        self._eos_ids = eos_ids
        self._reuse_replies = reuse_replies
        self._running: list[Sequence] = []

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._running)

    def __bool__(self) -> bool:
        return bool(self._running)

    def __len__(self) -> int:
        return len(self._running)

    @property
    def decoding(self) -> list[Sequence]:
        """The sequences that need a token after an earlier one."""
        return [sequence for sequence in self._running if sequence.decoding]

    @property
    def prefilling(self) -> Sequence | None:
        """The oldest sequence whose prompt is not yet complete in its slot."""
        return next((sequence for sequence in self._running if sequence.prefilling), None)

    def can_admit(self, submitted: deque[Sequence]) -> bool:
        """Return whether a submitted sequence can get a slot now."""
        return self._prefix_cache.has_free_slot and bool(submitted)

    def admit(self, submitted: deque[Sequence]) -> None:
        """Give free slots to the oldest submitted sequences."""
        while self.can_admit(submitted):
            sequence = submitted.popleft()
            sequence.slot, sequence.reused = self._prefix_cache.acquire(sequence.cache_scope, sequence.prompt_ids)
            sequence.holds_slot = True
            sequence.position = sequence.reused
            self._running.append(sequence)

    def drop_cancelled(self) -> None:
        """End the cancelled sequences."""
        for sequence in [sequence for sequence in self._running if sequence.cancelled]:
            self.end(sequence, FinishReason.CANCELLED)

    def emit(self, sequence: Sequence, token: TokenOrError) -> None:
        """Pass a token to the listener, unless the sequence has ended since the token was requested."""
        if sequence not in self._running:
            return
        if isinstance(token, Exception):
            self.fail(sequence, token)
            return
        try:
            sequence.output_ids.append(token)
            if token in self._eos_ids:
                self.end(sequence, FinishReason.END_OF_SEQUENCE)
            elif sequence.listener.on_token(token):
                self.end(sequence, FinishReason.STOP_SEQUENCE)
            elif len(sequence.output_ids) == sequence.params.max_tokens:
                self.end(sequence, FinishReason.MAX_TOKENS)
        except Exception as error:
            self.fail(sequence, error)

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence with an error, unless it has ended."""
        if sequence not in self._running:
            return
        sequence.request_error = _is_request_error(error)
        sequence.context.run(logger.error, "sequence failed in the engine", exc_info=error)
        self.end(sequence, FinishReason.FAILED)

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, whatever fails: the engine's thread must live, and the other sequences must continue."""
        sequence.ended = True
        if sequence in self._running:
            self._running.remove(sequence)
            self._release_slot(sequence, reason)
        reused = min(sequence.reused, sequence.input_tokens)
        result = SequenceResult(reason, sequence.input_tokens, len(sequence.output_ids), reused)
        try:
            sequence.listener.on_finish(result)
        except Exception as error:  # the supervision notices that the result is missing
            sequence.context.run(logger.error, "a sequence's result could not be delivered", exc_info=error)

    def _release_slot(self, sequence: Sequence, reason: FinishReason) -> None:
        """Free the sequence's slot, without its prefix if that fails; on another failure `holds_slot` stays True."""
        for cached in (reason, FinishReason.FAILED):  # without its prefix in the second attempt
            try:
                reusable = self._reusable(sequence, cached)
                self._prefix_cache.release(sequence.slot, sequence.cache_scope, reusable)
            except Exception as error:  # the next sequence needs the slot more than the prefix
                sequence.context.run(logger.error, "a KV cache slot could not be released", exc_info=error)
            else:
                sequence.holds_slot = False
                return

    def _reusable(self, sequence: Sequence, reason: FinishReason) -> list[int]:
        """Return the token ids in the KV cache that a later prompt may reuse."""
        if reason is FinishReason.FAILED:  # a failed step can leave wrong keys and values
            return []
        ids = [*sequence.prompt_ids, *sequence.output_ids] if self._reuse_replies else sequence.prompt_ids
        return ids[: sequence.position]


def _is_request_error(error: Exception) -> bool:
    if isinstance(error, SequenceError | torch.OutOfMemoryError | MemoryError):
        return True
    # On a CPU, torch has no class for it.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
