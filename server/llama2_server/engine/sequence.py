"""One prompt on its way through the engine, and who hears of it."""

import enum
from collections.abc import Hashable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Protocol

from llama2_server.engine.sampling import GenerationParams, Sampler


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    END_OF_SEQUENCE = enum.auto()
    STOP_SEQUENCE = enum.auto()
    MAX_TOKENS = enum.auto()
    CANCELLED = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """The end of a sequence, and what was computed for it; an end-of-sequence token counts."""

    reason: FinishReason
    input_tokens: int
    output_tokens: int
    reused_input_tokens: int = 0
    """Those of the input tokens that were in the KV cache already."""


class SequenceListener(Protocol):
    """Who gets a sequence's tokens; called on the engine's thread, so it must be quick and must not wait."""

    def on_token(self, token_id: int) -> bool:
        """Take one token (never an end-of-sequence one); True ends the sequence with STOP_SEQUENCE."""

    def on_finish(self, finish: SequenceResult) -> None:
        """Called once, last."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and the tokens generated after it, from `Engine.submit` until its listener hears `on_finish`."""

    prompt_ids: list[int]
    params: GenerationParams
    listener: SequenceListener
    cache_scope: Hashable | None = None
    slot: int = -1
    reused: int = 0  # tokens that the KV cache held already
    position: int = 0  # tokens in the KV cache, those of steps under way included
    requested: int = 0  # tokens that the model was asked for; those of steps under way are not in output_ids yet
    output_ids: list[int] = field(default_factory=list)
    sampler: Sampler | None = None
    context: Context = field(default_factory=copy_context)  # whose it is, for the log
    cancelled: bool = False

    def cancel(self) -> None:
        """End the sequence before the engine's next step; safe from any thread, and after the end."""
        self.cancelled = True

    @property
    def input_tokens(self) -> int:
        """How many tokens of the prompt are in the KV cache; 0 until any was computed for this sequence."""
        return min(self.position, len(self.prompt_ids)) if self.position > self.reused else 0

    @property
    def prefilling(self) -> bool:
        """Whether a part of the prompt is not in the KV cache yet."""
        return self.position < len(self.prompt_ids)

    @property
    def decoding(self) -> bool:
        """Whether its first token was asked for, and more may follow those asked for."""
        return 0 < self.requested < self.params.max_tokens
