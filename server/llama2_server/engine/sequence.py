"""A prompt in the engine, the listener for its tokens, and its result."""

import enum
from collections.abc import Hashable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Protocol

from llama2_server.engine.sampling import GenerationParams, Sampler
from llama2_server.engine.speculation.drafter import Drafter

TokenOrError = int | Exception
"""A row's next token id, or the error that prevented it."""


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    END_OF_SEQUENCE = enum.auto()
    STOP_SEQUENCE = enum.auto()
    MAX_TOKENS = enum.auto()
    CANCELLED = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """Why a sequence ended, and its token counts; an end-of-sequence token counts as an output token."""

    reason: FinishReason
    input_tokens: int
    output_tokens: int
    reused_input_tokens: int = 0
    """Input tokens reused from the KV cache, included in `input_tokens`."""


class SequenceListener(Protocol):
    """Receives a sequence's tokens on the engine's thread, so its methods must be quick and must not block."""

    def on_token(self, token_id: int) -> bool:
        """Receive one token, never an end-of-sequence token; return True to end the sequence with STOP_SEQUENCE."""

    def on_finish(self, result: SequenceResult) -> None:
        """Receive the result; called exactly once, after the last token."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and its generated tokens, from `Engine.submit` until `on_finish` is called on its listener."""

    prompt_ids: list[int]
    params: GenerationParams
    listener: SequenceListener
    cache_scope: Hashable | None = None
    slot: int = -1
    reused: int = 0  # prompt tokens that the KV cache already held
    position: int = 0  # tokens in the KV cache, including the steps in progress
    requested: int = 0  # tokens requested from the model, including the steps in progress, unlike output_ids
    output_ids: list[int] = field(default_factory=list)
    sampler: Sampler | None = None
    drafter: Drafter | None = None  # guesses of the next tokens; None before the first step that could check some
    context: Context = field(default_factory=copy_context)  # log fields of the request
    cancelled: bool = False
    holds_slot: bool = False  # from the admission until the engine has confirmed that the slot is free again
    request_error: bool = False  # it failed, and the device and the other sequences are not affected
    ended: bool = False  # the engine computes nothing more; `on_finish` follows

    def cancel(self) -> None:
        """End the sequence before the engine's next step; safe from any thread, and a no-op after the end."""
        self.cancelled = True

    @property
    def input_tokens(self) -> int:
        """Number of prompt tokens in the KV cache; 0 until the first one is computed for this sequence."""
        return min(self.position, len(self.prompt_ids)) if self.position > self.reused else 0

    @property
    def prefilling(self) -> bool:
        """Whether a part of the prompt is not yet in the KV cache."""
        return self.position < len(self.prompt_ids)

    @property
    def decoding(self) -> bool:
        """Whether the first token was requested and more tokens may follow the requested ones."""
        return 0 < self.requested < self.params.max_tokens
