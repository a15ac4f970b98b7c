"""Sampling for all rows of a step at once, without a look from the host: what `engine/sampling.py` does, row by row.

The order and the meaning of penalties, temperature, top_k and top_p are those of `Sampler.sample`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llama2_server.engine.sampling import GenerationParams

NO_TOKEN = -1
"""What stands for the token of a row whose logits are not finite."""


@dataclass(frozen=True, slots=True)
class RowParams:
    """How each row is sampled; every tensor is (rows, 1) and float64."""

    temperature: Tensor  # 0 = greedy
    top_k: Tensor  # 0 = all
    top_p: Tensor
    repetition_penalty: Tensor
    frequency_penalty: Tensor
    presence_penalty: Tensor
    uniform: Tensor  # in [0, 1)


def is_plain(params: GenerationParams) -> bool:
    """Whether the token with the largest logit is the next one."""
    return params.temperature == 0 and not is_penalised(params)


def is_penalised(params: GenerationParams) -> bool:
    """Whether it matters which tokens came before."""
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


class PenaltyState:
    """Which tokens each slot has seen, and how often it has generated each; kept where penalties need it.

    There is one place more than there are slots, for rows that only fill up a step.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self._seen = torch.zeros(slots + 1, vocab_size, dtype=torch.bool, device=device)
        self._counts = torch.zeros(slots + 1, vocab_size, device=device)

    def begin(self, slot: int, prompt_ids: list[int]) -> None:
        """A new sequence has the slot."""
        self._seen[slot] = False
        self._seen[slot, prompt_ids] = True
        self._counts[slot] = 0

    def add(self, slots: Tensor, token_ids: Tensor) -> None:  # (rows,) each
        """Each slot has generated a token."""
        places = slots * self._seen.shape[1] + token_ids
        self._seen.view(-1).index_fill_(0, places, True)
        self._counts.view(-1).scatter_add_(0, places, torch.ones_like(places, dtype=self._counts.dtype))

    def penalised(self, logits: Tensor, slots: Tensor, params: RowParams) -> Tensor:  # (rows, vocab_size)
        """The logits less the rows' penalties."""
        seen, counts = self._seen[slots], self._counts[slots]
        penalty = params.repetition_penalty.float()
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        return logits - (counts * params.frequency_penalty + (counts > 0) * params.presence_penalty).float()


def greedy(logits: Tensor) -> Tensor:  # (rows, vocab_size) -> (rows,)
    """The token with the largest logit, or NO_TOKEN where a logit is not finite."""
    return _only_finite(logits, logits.argmax(dim=1))


def draw(logits: Tensor, params: RowParams) -> Tensor:  # (rows, vocab_size) -> (rows,)
    """One token a row from its distribution (greedy rows: the likeliest), or NO_TOKEN where a logit is not finite."""
    largest, order = logits.sort(dim=1, descending=True, stable=True)
    weights = _weights(largest, params)
    cumulative = weights.cumsum(dim=1)
    index = torch.searchsorted(cumulative, params.uniform * cumulative[:, -1:], right=True)
    # Rounding may lead past the last token that has any weight.
    index = torch.minimum(index, (weights > 0).sum(dim=1, keepdim=True) - 1).clamp(min=0)
    index = torch.where(params.temperature == 0, 0, index)
    return _only_finite(logits, order.gather(1, index).squeeze(1))


def _weights(largest: Tensor, params: RowParams) -> Tensor:  # (rows, vocab_size), descending -> the same, float64
    # Less the maximum and in float64, no temperature above zero can overflow the exponential.
    temperature = torch.where(params.temperature == 0, 1.0, params.temperature)
    weights = ((largest.double() - largest[:, :1]) / temperature).exp()
    vocab_size = largest.shape[1]
    top_k = torch.where(params.top_k == 0, vocab_size, params.top_k).long().clamp(max=vocab_size)
    weights = torch.where(largest >= largest.gather(1, top_k - 1), weights, 0.0)
    cumulative = weights.cumsum(dim=1)
    before = pad(cumulative[:, :-1], (1, 0))
    return torch.where((before < params.top_p * cumulative[:, -1:]) | (params.top_p >= 1), weights, 0.0)


def _only_finite(logits: Tensor, token_ids: Tensor) -> Tensor:  # (rows,)
    # A sum is finite only if each term is.
    return torch.where(logits.sum(dim=1).isfinite(), token_ids, NO_TOKEN)
