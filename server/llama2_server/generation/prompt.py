"""The prompt of one generation."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and whether they are raw text; the continuation of raw text keeps its leading space."""

    token_ids: tuple[int, ...]
    raw: bool
