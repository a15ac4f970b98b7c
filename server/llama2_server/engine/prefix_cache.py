"""The prefix cache: tokens in the KV cache of free slots, which later prompts with the same prefix reuse.

Tokens are reused only within one `cache_scope`. Otherwise the duration of a prefill would reveal the prompts of other
accounts. Every logit has the same bits as after a prefill from the start. If the chunking of a prompt changes bits
(`Model.chunk_invariant` is False), only whole prefill chunks are reused. Generated tokens, which were computed one by
one, are then not reused.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class _CachedPrefix(NamedTuple):
    cache_scope: Hashable | None
    token_ids: Sequence[int]


class PrefixCache:
    """The free slots and the tokens cached in each.

    Args:
        slots: number of slots, all free at first.
        chunk_tokens: cached and reused tokens are a multiple of this number.
    """

    def __init__(self, slots: int, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        # In the order of release, so that equally good slots are reused oldest first.
        self._free = {slot: _CachedPrefix(None, ()) for slot in range(slots)}

    @property
    def has_free_slot(self) -> bool:
        """Whether `acquire` can return a slot."""
        return bool(self._free)

    def acquire(self, cache_scope: Hashable | None, prompt_ids: Sequence[int]) -> tuple[int, int]:
        """Take the free slot that saves the most prefill, the least recently used one of several equal ones.

        Return the slot and the number of reusable prompt tokens in it. A `cache_scope` of None reuses no tokens.
        """
        slot = max(self._free, key=lambda slot: self._reusable(slot, cache_scope, prompt_ids))
        reusable = self._reusable(slot, cache_scope, prompt_ids)
        del self._free[slot]
        return slot, reusable

    def release(self, slot: int, cache_scope: Hashable | None, cached_ids: Sequence[int]) -> None:
        """Free a slot whose KV cache starts with `cached_ids`, which only `cache_scope` may reuse."""
        whole_chunks = len(cached_ids) // self._chunk_tokens * self._chunk_tokens
        self._free[slot] = _CachedPrefix(cache_scope, cached_ids[:whole_chunks])

    def _reusable(self, slot: int, cache_scope: Hashable | None, prompt_ids: Sequence[int]) -> int:
        cached = self._free[slot]
        if cache_scope is None or cached.cache_scope != cache_scope:
            return 0
        # At least the last prompt token must be computed, because the logits after it are not cached.
        limit = min(len(cached.token_ids), len(prompt_ids) - 1)
        common = next((index for index in range(limit) if cached.token_ids[index] != prompt_ids[index]), limit)
        return common // self._chunk_tokens * self._chunk_tokens
