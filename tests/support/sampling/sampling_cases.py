"""Random cases for the native sampler and for that of a GPU, compared with the reference sampler."""

import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.native_sampler import NO_TOKEN, NativeSampler
from llama2_server.engine.sampling import GenerationParams, Sampler

TOLERANCE = 1e-12
"""Tokens may differ only if the number is this close to a boundary, as a share of the whole sum."""
STEPS = 5  # tokens per sequence; penalties depend on the tokens before
VOCAB_SIZES = (100, 101, 128, 250, 600, 1000, 2560, 4097, 8192, 32_000, 50_257, 128_000)
# Most cases are small, because the reference sorts the whole vocabulary.
VOCAB_WEIGHTS = (20, 10, 10, 10, 15, 10, 10, 6, 4, 3, 1, 1)
SHIFTS = (0.0, 1e-16, 1e-14, 1e-13, 1e-11, 1e-9)


@dataclass(slots=True)
class Comparison:
    """The numbers of compared tokens and of those that differ next to a boundary."""

    cases: int = 0
    different: int = 0


class TestedSampler(Protocol):
    """A sampler of one sequence, with its own state for penalties."""

    def sample(self, logits: Tensor, uniform: float) -> int:
        """Return the token that the number selects, or NO_TOKEN."""
        ...


MakeSampler = Callable[[GenerationParams, Sequence[int], int], TestedSampler]
"""Makes a sampler from parameters, the tokens of the prompt and the size of the vocabulary."""


class _Native:
    def __init__(self, instructions: str, params: GenerationParams, prompt_ids: list[int], vocab_size: int) -> None:
        self._instructions = instructions
        self._sampler = NativeSampler(params, prompt_ids, vocab_size)

    def sample(self, logits: Tensor, uniform: float) -> int:
        self._sampler._uniform = partial(float, uniform)
        (token_id,) = self._sampler.sample(logits[None], self._instructions)
        return token_id


def compare(cases: int, seed: int, instructions: str = "") -> Comparison:
    """Sample tokens with the native sampler and the reference; see `compare_with`."""
    return compare_with(partial(_Native, instructions), cases, seed)


def compare_with(
    make_sampler: MakeSampler, cases: int, seed: int, vocab_sizes: Sequence[int] = VOCAB_SIZES
) -> Comparison:
    """Sample tokens with the tested sampler and the reference.

    Raises:
        AssertionError: a token differs, and its number is not next to a boundary.
    """
    rng, found = random.Random(seed), Comparison()
    while found.cases < cases:
        params = _params(rng)
        vocab_size = rng.choices(vocab_sizes, VOCAB_WEIGHTS[: len(vocab_sizes)])[0]
        prompt_ids = [rng.randrange(vocab_size) for _ in range(rng.randrange(30))]
        logits = _logits(rng, vocab_size)
        reference = Sampler(params, prompt_ids, vocab_size, "cpu")
        tested = make_sampler(params, prompt_ids, vocab_size)
        for uniform in _uniforms(rng, reference, logits):
            reference._uniform = partial(float, uniform)
            penalized = reference._penalize(logits)
            found.cases += 1
            expected, token_id = _token(reference, logits), tested.sample(logits, uniform)
            if token_id != expected:
                context = f"{params}, {vocab_size} tokens, number {uniform!r}: {token_id} instead of {expected}"
                assert token_id in _tokens_next_to_boundaries(reference, penalized, uniform), context
                found.different += 1
                break  # the penalties of the next token would differ
    return found


def _token(sampler: Sampler, logits: Tensor) -> int:
    try:
        return sampler.sample(logits)
    except EngineError:  # a penalty made a logit infinite
        return NO_TOKEN


def _params(rng: random.Random) -> GenerationParams:
    return GenerationParams(
        max_tokens=1,
        temperature=rng.choice((0.0, 1e-320, 1e-4, 0.1, 0.5, 0.6, 0.6, 0.6, 1.0, 1.0, 2.0, 5.0)),
        top_p=rng.choice((1e-9, 0.1, 0.5, 0.9, 0.9, 0.9, 0.99, 0.999999, 1 - 2**-53, 1.0, rng.random() or 1.0)),
        top_k=rng.choice((0, 0, 0, 1, 2, 40, 99, 1000, 10**9)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.0, 1.3, 2.0, 0.7, 1e-3)),
        frequency_penalty=rng.choice((0.0, 0.0, 0.0, 0.7, 2.0, -2.0)),
        presence_penalty=rng.choice((0.0, 0.0, 0.0, 0.3, -1.1)),
    )


def _logits(rng: random.Random, vocab_size: int) -> Tensor:  # (vocab_size,)
    """Return logits of one of many kinds: as of trained models, flat, equal, of few values, or extreme."""
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    kind = rng.randrange(10)
    if kind < 4:
        return logits * rng.choice((0.01, 0.5, 3.0, 5.0, 20.0))
    if kind == 4:
        return (logits * 4).half().float()
    if kind == 5:
        return (logits * rng.choice((1, 3, 10))).round()  # with -0 and 0, which are equal
    if kind == 6:
        return torch.full_like(logits, rng.choice((0.0, -3.7, 1e30)))
    if kind == 7:
        return logits * rng.choice((1e-40, 1e-20, 1e20, 1e37))  # subnormal numbers are among them
    if kind == 8:
        logits[rng.randrange(vocab_size)] = rng.choice((100.0, 1e4, -1e30))
        return logits
    return logits.sort(descending=rng.random() < 0.5).values * 4


def _uniforms(rng: random.Random, sampler: Sampler, logits: Tensor) -> Iterator[float]:
    """Yield random numbers and, for some sequences, numbers close to a boundary between two tokens."""
    closest = sampler._params.temperature > 0 and rng.random() < 0.2
    for _ in range(STEPS):
        uniform = rng.choice((0.0, 1 - 2**-53)) if rng.random() < 0.02 else rng.random()
        if closest:
            _, weights = sampler._distribution(sampler._penalize(logits))
            sums = weights.cumsum(0)
            uniform = float(sums[rng.randrange(len(sums))] / sums[-1]) + rng.choice(SHIFTS) * rng.choice((-1, 1))
        yield min(max(uniform, 0.0), 1 - 2**-53)


def _tokens_next_to_boundaries(sampler: Sampler, logits: Tensor, uniform: float) -> list[int]:  # (vocab_size,)
    """Return the tokens that the number and the share of top_p select by exact sums, each moved by the tolerance."""
    params = sampler._params
    if params.temperature == 0:
        return []
    sampler._params = replace(params, top_p=1.0)
    candidates = list(zip(*(tensor.tolist() for tensor in sampler._distribution(logits)), strict=True))
    if params.top_p < 1:  # in the order of the sums
        values = logits.tolist()
        candidates.sort(key=lambda candidate: (-values[candidate[0]], candidate[0]))
    token_ids, weights = zip(*candidates, strict=True)
    sums = list(accumulate(map(Fraction, weights)))
    # The nucleus ends with the first sum that reaches the share; without top_p, it has all candidates.
    shares = (Fraction(params.top_p) + shift for shift in (-Fraction(TOLERANCE), Fraction(TOLERANCE)))
    least, most = (bisect_left(sums, share * sums[-1], hi=len(sums) - 1) for share in shares)
    first = bisect_right(sums, (Fraction(uniform) - Fraction(TOLERANCE)) * sums[least])
    last = bisect_right(sums, (Fraction(uniform) + Fraction(TOLERANCE)) * sums[most], hi=most)
    return list(token_ids[first : last + 1])
