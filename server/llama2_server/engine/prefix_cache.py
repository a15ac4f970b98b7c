"""What the KV cache of a free slot still holds, so that a prompt that begins alike prefills only the rest.

Tokens are reused only within one `cache_scope`. Otherwise the duration of a prefill would reveal the prompts of other
accounts.
Every logit is bit for bit the one of a prefill from the start. Where the pieces in which a prompt is computed change
bits (Model.chunk_invariant), only whole prefill chunks are reused, and no generated tokens, which came one by one.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class _CachedPrefix(NamedTuple):
    cache_scope: Hashable | None
    token_ids: Sequence[int]


class PrefixCache:
    """The free slots, those first that have been free the longest, and the tokens in each, in multiples of a chunk."""

    def __init__(self, slots: int, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._held = {slot: _CachedPrefix(None, ()) for slot in range(slots)}

    def __bool__(self) -> bool:
        return bool(self._held)

    def acquire(self, cache_scope: Hashable | None, prompt_ids: Sequence[int]) -> tuple[int, int]:
        """The slot that saves the most of this prompt's prefill, and how many tokens; None owns nothing."""
        slot = max(self._held, key=lambda slot: self._reusable(slot, cache_scope, prompt_ids))
        reusable = self._reusable(slot, cache_scope, prompt_ids)
        del self._held[slot]
        return slot, reusable

    def release(self, slot: int, cache_scope: Hashable | None, held_ids: Sequence[int]) -> None:
        """Take a slot back, whose KV cache begins with these tokens of its cache_scope's."""
        whole_chunks = len(held_ids) // self._chunk_tokens * self._chunk_tokens
        self._held[slot] = _CachedPrefix(cache_scope, held_ids[:whole_chunks])

    def _reusable(self, slot: int, cache_scope: Hashable | None, prompt_ids: Sequence[int]) -> int:
        held = self._held[slot]
        if cache_scope is None or held.cache_scope != cache_scope:
            return 0
        # At least the last token of the prompt is computed: the logits after it are not kept.
        limit = min(len(held.token_ids), len(prompt_ids) - 1)
        common = next((at for at in range(limit) if held.token_ids[at] != prompt_ids[at]), limit)
        return common // self._chunk_tokens * self._chunk_tokens
