"""Sample the next token from logits: penalties, temperature, top_k, top_p and one reproducible draw."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama2_server.engine.errors import NonFiniteLogits

# The top_p nucleus is first searched among this number of largest probabilities, which nearly always contain it. A full
# sort of 32,000 probabilities takes twenty times as long.
NUCLEUS_GUESS = 256


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
        logits = logits.float()
        # A sum is finite only if each term is, so one cheap reduction checks all logits.
        if not math.isfinite(logits.sum().item()):
            raise NonFiniteLogits
        logits = self._penalize(logits)
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
        index = _invert_cdf(weights, self._uniform())
        return index if token_ids is None else int(token_ids[index])

    def _distribution(self, logits: Tensor) -> tuple[Tensor | None, Tensor]:  # (vocab_size,) -> (kept,) each
        """Return the candidate ids (None means all ids, in order) and their unnormalized probabilities."""
        token_ids, logits = _top_k(logits, self._params.top_k)
        # With the maximum subtracted, and in float64, no temperature above zero overflows the exponential.
        weights = ((logits.double() - logits.max()) / self._params.temperature).exp_()
        order, weights = _top_p(weights, self._params.top_p)
        return _compose(token_ids, order), weights

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


def _top_k(logits: Tensor, top_k: int) -> tuple[Tensor | None, Tensor]:  # (vocab_size,) -> ids and logits, (kept,)
    """Return the `top_k` largest logits, plus all logits equal to the smallest of them, as in transformers."""
    if top_k == 0 or top_k >= logits.shape[0]:
        return None, logits
    threshold = logits.topk(top_k).values[-1]
    kept = (logits >= threshold).nonzero().squeeze(1)
    return kept, logits[kept]


def _top_p(weights: Tensor, top_p: float) -> tuple[Tensor | None, Tensor]:  # (n,) -> indices and weights, (kept,)
    """Return the fewest largest weights whose share of the sum reaches `top_p` (nucleus, Holtzman et al. 2019)."""
    if top_p >= 1.0:
        return None, weights
    target = top_p * weights.sum()
    largest, order = weights.topk(min(NUCLEUS_GUESS, weights.shape[0]))
    cumulative = largest.cumsum(0)
    if cumulative[-1] < target:
        largest, order = weights.sort(descending=True)
        cumulative = largest.cumsum(0)
    kept = min(int((cumulative < target).sum()) + 1, largest.shape[0])
    return order[:kept], largest[:kept]


def _compose(outer: Tensor | None, inner: Tensor | None) -> Tensor | None:  # ids selected by indices, (kept,)
    if inner is None:
        return outer
    return inner if outer is None else outer[inner]


def _invert_cdf(weights: Tensor, uniform: float) -> int:  # (n,)
    """Return the index whose slice of the normalized cumulative sum contains `uniform`, which is in [0, 1)."""
    cumulative = weights.cumsum(0)
    # right=True, so that a weight of zero is never drawn.
    index = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return min(index, weights.shape[0] - 1)
