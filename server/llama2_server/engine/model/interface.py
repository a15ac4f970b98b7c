"""The interface between the step loop and a model."""

from typing import Protocol

import torch
from torch import Tensor


class Model(Protocol):
    """The model interface that the step loop uses; tests implement it with a fake."""

    @property
    def vocab_size(self) -> int:
        """Number of logits per row."""

    @property
    def context_length(self) -> int:
        """Maximum number of tokens per slot."""

    @property
    def slots(self) -> int:
        """Number of slots, the maximum number of concurrent sequences."""

    @property
    def device(self) -> torch.device:
        """The device that the model runs on."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""

    @property
    def kernels(self) -> str:
        """The family of the native kernels, portable or amx; empty if the model does not run natively."""

    @property
    def memory_bytes(self) -> int:
        """Memory that the model uses on its device, in bytes."""

    @property
    def prefill_chunk_tokens(self) -> int:
        """Number of prompt tokens per prefill step.

        Larger chunks are faster, but the other sequences wait for each chunk.
        """

    @property
    def chunk_invariant(self) -> bool:
        """Whether keys and values have the same bits for any chunking of the tokens, one by one included."""

    def prefill(self, slot: int, token_ids: list[int], position: int) -> Tensor:  # (vocab_size,)
        """Append tokens to the slot, which holds `position` tokens; return float32 logits after the last one."""

    def decode(self, slots: list[int], token_ids: list[int], positions: list[int]) -> Tensor:  # (rows, vocab_size)
        """Append one token to each slot, which hold `positions` tokens; return float32 logits after each."""
