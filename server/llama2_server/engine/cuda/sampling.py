"""Batched sampling on the device, without host synchronization.

It follows the rules of the reference sampler, `engine/sampling.py`, for each row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llama2_server.engine.sampling import GenerationParams

NO_TOKEN = -1
"""The token id of a row whose logits are not finite."""


@dataclass(frozen=True, slots=True)
class BatchSamplingParams:
    """Sampling parameters of each row; every tensor is (rows, 1) and float64."""

    temperature: Tensor  # 0 = greedy
    top_k: Tensor  # 0 = all
    top_p: Tensor
    repetition_penalty: Tensor
    frequency_penalty: Tensor
    presence_penalty: Tensor
    uniform: Tensor  # in [0, 1)


def is_argmax(params: GenerationParams) -> bool:
    """Return whether the next token is always the one with the largest logit."""
    return params.temperature == 0 and not has_penalties(params)


def has_penalties(params: GenerationParams) -> bool:
    """Return whether sampling depends on the previous tokens."""
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


class PenaltyState:
    """The tokens that each slot has seen and how often it generated each, maintained only for rows with penalties.

    One additional slot is for padding rows.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self.seen = torch.zeros(slots + 1, vocab_size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(slots + 1, vocab_size, device=device)

    def reset(self, slot: int, prompt_ids: list[int]) -> None:
        """Start a new sequence in the slot."""
        self.seen[slot] = False
        self.seen[slot, prompt_ids] = True
        self.counts[slot] = 0

    def add_tokens(self, slots: Tensor, token_ids: Tensor) -> None:  # (rows,) each
        """Record one generated token for each slot."""
        indices = slots * self.seen.shape[1] + token_ids
        self.seen.view(-1).index_fill_(0, indices, True)
        self.counts.view(-1).scatter_add_(0, indices, torch.ones_like(indices, dtype=self.counts.dtype))

    def apply_penalties(
        self, logits: Tensor, slots: Tensor, params: BatchSamplingParams
    ) -> Tensor:  # (rows, vocab_size)
        """Return the logits with the penalties of each row applied."""
        seen, counts = self.seen[slots], self.counts[slots]
        penalty = params.repetition_penalty.float()
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        return logits - (counts * params.frequency_penalty + (counts > 0) * params.presence_penalty).float()


def greedy(logits: Tensor) -> Tensor:  # (rows, vocab_size) -> (rows,)
    """Return the token with the largest logit of each row, or NO_TOKEN if a logit is not finite."""
    return _only_finite(logits, logits.argmax(dim=1))


def sample(logits: Tensor, params: BatchSamplingParams) -> Tensor:  # (rows, vocab_size) -> (rows,)
    """Return one sampled token per row (temperature 0: the likeliest), or NO_TOKEN if a logit is not finite."""
    largest, order = logits.sort(dim=1, descending=True, stable=True)
    weights = _weights(largest, params)
    # Without a nucleus, the sums are in the order of the ids.
    by_id = torch.zeros_like(weights).scatter(1, order, weights)
    ids = torch.arange(logits.shape[1], device=logits.device).expand_as(order)
    sorted_rows = (params.top_p < 1) | (params.temperature == 0)
    weights, order = torch.where(sorted_rows, weights, by_id), torch.where(sorted_rows, order, ids)
    cumulative = weights.cumsum(dim=1)
    total = cumulative[:, -1:]
    index = torch.searchsorted(cumulative, params.uniform * total, right=True)
    # The product can be rounded up to the whole sum: then the last weight that changes the sum is drawn.
    index = torch.minimum(index, (cumulative < total).sum(dim=1, keepdim=True))
    index = torch.where(params.temperature == 0, 0, index)
    return _only_finite(logits, order.gather(1, index).squeeze(1))


def _weights(largest: Tensor, params: BatchSamplingParams) -> Tensor:  # (rows, vocab_size), descending -> float64
    # Subtracting the maximum in float64 prevents an overflow of exp() for any positive temperature.
    temperature = torch.where(params.temperature == 0, 1.0, params.temperature)
    weights = ((largest.double() - largest[:, :1]) / temperature).exp()
    vocab_size = largest.shape[1]
    top_k = torch.where(params.top_k == 0, vocab_size, params.top_k).long().clamp(max=vocab_size)
    weights = torch.where(largest >= largest.gather(1, top_k - 1), weights, 0.0)
    cumulative = weights.cumsum(dim=1)
    before = pad(cumulative[:, :-1], (1, 0))
    return torch.where((before < params.top_p * cumulative[:, -1:]) | (params.top_p >= 1), weights, 0.0)


def _only_finite(logits: Tensor, token_ids: Tensor) -> Tensor:  # (rows,)
    return torch.where(logits.isfinite().all(dim=1), token_ids, NO_TOKEN)
