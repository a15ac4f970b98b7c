"""The prompt of one generation."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads: token ids, and whether the reply continues raw text (and so keeps its leading space)."""

    token_ids: tuple[int, ...]
    raw: bool
