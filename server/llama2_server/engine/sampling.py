"""The reference sampler: penalties, temperature, top_k, top_p and one reproducible draw of the next token.

`native/sampling.hpp` and `cuda/sampling.py` follow these rules, so that a seed gives the same tokens on every device:

1. A logit that is not finite, before or after the penalties, is an error. Penalties are computed in float32.
2. At temperature 0 the token is the one with the largest logit. Of equal logits, the one with the lower id comes first.
3. top_k keeps the largest logits, and all that equal the smallest of them.
4. Weights are float64: exp((logit - largest logit) / temperature).
5. If top_p is below 1, the candidates are sorted: largest logit first, equal ones by id. top_p keeps the first
   candidates whose sum reaches its share of the whole sum. Otherwise the candidates stay in order of their ids.
6. Sums are taken in that order. The n-th drawn token uses the n-th number of `random.Random(seed).random()`: the first
   candidate whose sum is above this share of the whole sum.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama2_server.engine.errors import NonFiniteLogits


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """Generation parameters of one sequence. The API validates the values; this class does not."""

    max_tokens: int
    temperature: float = 0.6  # 0 = greedy
    top_p: float = 0.9  # 1 = off
    top_k: int = 0  # 0 = all
    seed: int = 0  # any unsigned 64-bit number
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()


class Sampler:
    """The sampling state of one sequence: its random stream and, for penalties, the tokens seen so far."""

    def __init__(
        self, params: GenerationParams, prompt_ids: Sequence[int], vocab_size: int, device: torch.device | str
    ) -> None:
        self._params = params
        # Unlike torch's generator, Python's gives the same stream on all devices and needs no device synchronization.
        self._uniform = random.Random(params.seed).random  # noqa: S311 - no secret depends on it
        self._seen = _seen_mask(params, prompt_ids, vocab_size, device)
        self._offsets = _zero_offsets(params, vocab_size, device)
        self._counts: Counter[int] = Counter()

    def sample(self, logits: Tensor) -> int:  # (vocab_size,)
        """Return the id of the next token.

        The steps are applied in the order of transformers' `generate`: repetition penalty, frequency and presence
        penalty, temperature, top_k, top_p.

        Raises:
            NonFiniteLogits: a logit is not finite.
        """
        logits = self._penalize(logits.float())
        if not logits.isfinite().all():
            raise NonFiniteLogits
        # Of equal logits, argmax returns the one with the lower id.
        token_id = int(logits.argmax()) if self._params.temperature == 0 else self._draw(logits)
        self._remember(token_id)
        return token_id

    def _penalize(self, logits: Tensor) -> Tensor:  # (vocab_size,) -> (vocab_size,)
        if self._seen is not None:
            penalty = self._params.repetition_penalty
            # Keskar et al. 2019 (CTRL), with transformers' correction for negative logits.
            scaled = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self._seen, scaled, logits)
        if self._offsets is not None:
            logits = logits - self._offsets
        return logits

    def _draw(self, logits: Tensor) -> int:  # (vocab_size,)
        token_ids, weights = self._distribution(logits)
        return int(token_ids[_invert_cdf(weights, self._uniform())])

    def _distribution(self, logits: Tensor) -> tuple[Tensor, Tensor]:  # (vocab_size,) -> (candidates,) each
        """Return the ids of the candidates and their unnormalized probabilities, in the order of the sums."""
        token_ids = _top_k(logits, self._params.top_k)
        logits = logits[token_ids]
        if self._params.top_p < 1.0:
            logits, order = logits.sort(descending=True, stable=True)
            token_ids = token_ids[order]
        # With the maximum subtracted, and in float64, no temperature above zero overflows the exponential.
        weights = ((logits.double() - logits.max()) / self._params.temperature).exp_()
        kept = _nucleus_size(weights, self._params.top_p)
        return token_ids[:kept], weights[:kept]

    def _remember(self, token_id: int) -> None:
        if self._seen is not None:
            self._seen[token_id] = True
        if self._offsets is not None:
            self._counts[token_id] += 1
            frequency = self._params.frequency_penalty * self._counts[token_id]
            self._offsets[token_id] = frequency + self._params.presence_penalty


def _seen_mask(
    params: GenerationParams, prompt_ids: Sequence[int], vocab_size: int, device: torch.device | str
) -> Tensor | None:  # (vocab_size,) bool
    if params.repetition_penalty == 1.0:
        return None
    seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    seen[list(prompt_ids)] = True
    return seen


def _zero_offsets(params: GenerationParams, vocab_size: int, device: torch.device | str) -> Tensor | None:
    """Return zero offsets, (vocab_size,), or None without penalties.

    An offset is subtracted from its logit. By OpenAI's formula it is
    count * frequency_penalty + (count > 0) * presence_penalty.
    """
    if params.frequency_penalty == 0.0 and params.presence_penalty == 0.0:
        return None
    return torch.zeros(vocab_size, device=device)


def _top_k(logits: Tensor, top_k: int) -> Tensor:  # (vocab_size,) -> ids, (kept,)
    """Return the ids of the `top_k` largest logits and of all equal to the smallest of them, as in transformers."""
    if top_k == 0 or top_k >= logits.shape[0]:
        return torch.arange(logits.shape[0], device=logits.device)
    threshold = logits.topk(top_k).values[-1]
    return (logits >= threshold).nonzero().squeeze(1)


def _nucleus_size(weights: Tensor, top_p: float) -> int:  # (candidates,)
    """Return how many weights reach `top_p` of their sum (nucleus sampling, Holtzman et al. 2019)."""
    if top_p >= 1.0:
        return weights.shape[0]
    cumulative = weights.cumsum(0)
    return int((cumulative < top_p * cumulative[-1]).sum()) + 1


def _invert_cdf(weights: Tensor, uniform: float) -> int:  # (candidates,)
    """Return the index whose slice of the normalized cumulative sum contains `uniform`, which is in [0, 1)."""
    cumulative = weights.cumsum(0)
    # right=True, so that a weight of zero is never drawn.
    index = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    # The product can be rounded up to the whole sum: then the last weight that changes the sum is drawn.
    return min(index, int((cumulative < cumulative[-1]).sum()))
