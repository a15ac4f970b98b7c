"""What the KV cache of a free slot still holds, so that a prompt that begins alike prefills only the rest.

Only an owner's own tokens are reused: how long a prompt takes would else tell one account what another one has asked.
Every logit is bit for bit the one of a prefill from the start. Where the pieces in which a prompt is computed change
bits (Model.any_pieces), only whole prefill chunks are reused, and no generated tokens, which came one by one.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class _CachedPrefix(NamedTuple):
    owner: Hashable | None
    token_ids: Sequence[int]


class PrefixCache:
    """The free slots, those first that have been free the longest, and the tokens in each, in multiples of a chunk."""

    def __init__(self, slots: int, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._held = {slot: _CachedPrefix(None, ()) for slot in range(slots)}

    def __bool__(self) -> bool:
        return bool(self._held)

    def take(self, owner: Hashable | None, prompt_ids: Sequence[int]) -> tuple[int, int]:
        """The slot that saves the most of this prompt's prefill, and how many tokens; None owns nothing."""
        slot = max(self._held, key=lambda slot: self._reusable(slot, owner, prompt_ids))
        reusable = self._reusable(slot, owner, prompt_ids)
        del self._held[slot]
        return slot, reusable

    def give_back(self, slot: int, owner: Hashable | None, held_ids: Sequence[int]) -> None:
        """Take a slot back, whose KV cache begins with these tokens of its owner's."""
        whole_chunks = len(held_ids) // self._chunk_tokens * self._chunk_tokens
        self._held[slot] = _CachedPrefix(owner, held_ids[:whole_chunks])

    def _reusable(self, slot: int, owner: Hashable | None, prompt_ids: Sequence[int]) -> int:
        held = self._held[slot]
        if owner is None or held.owner != owner:
            return 0
        # At least the last token of the prompt is computed: the logits after it are not kept.
        limit = min(len(held.token_ids), len(prompt_ids) - 1)
        common = next((at for at in range(limit) if held.token_ids[at] != prompt_ids[at]), limit)
        return common // self._chunk_tokens * self._chunk_tokens
