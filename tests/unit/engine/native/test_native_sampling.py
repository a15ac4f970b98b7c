"""Tests of native sampling against the reference sampler, on each instruction set of this processor."""

import math
import random
from dataclasses import replace

import pytest
import torch
from tests.support.sampling.sampling_cases import compare
from tests.unit.engine.native.models import library

from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.native_sampler import NO_TOKEN, NativeSampler
from llama2_server.engine.sampling import GenerationParams, Sampler

CASES = 2_000  # tests/integration/engine/test_native_sampling.py has 100,000
PARAMS = {
    "greedy": GenerationParams(1, 0.0),
    "default": GenerationParams(1),
    "all tokens": GenerationParams(1, top_p=1.0),
    "top_k": GenerationParams(1, top_p=1.0, top_k=3),
    "penalties": GenerationParams(1, 0.7, 0.9, 20, 0, 1.2, 0.4, 0.3),
}


@pytest.mark.parametrize("seed", [1, 2])
def test_tokens_equal_the_reference(portable_instructions: str, seed: int) -> None:
    """Random logits, parameters and numbers give the same token, except within 1e-12 of a boundary."""
    found = compare(CASES, seed, portable_instructions)
    assert found.cases >= CASES
    # Only the numbers that the test puts there are that close.
    assert found.different < CASES / 100


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 500, 999])
def test_logits_that_are_not_finite_give_no_token(
    portable_instructions: str, params: GenerationParams, bad: float, position: int
) -> None:
    """One such logit is enough; the other rows keep their tokens."""
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    expected = NativeSampler(params, [1, 2], 1000).sample(logits[:1], portable_instructions)
    logits[1, position] = bad
    assert NativeSampler(params, [1, 2], 1000).sample(logits[:2], portable_instructions) == [*expected, NO_TOKEN]


@pytest.mark.parametrize("step_logits", [3e38, -3e38])
def test_penalties_that_overflow_give_no_token(portable_instructions: str, step_logits: float) -> None:
    """The reference fails, too."""
    params, logits = GenerationParams(1, repetition_penalty=0.5 if step_logits > 0 else 2.0), torch.zeros(1, 100)
    logits[0, 7] = step_logits
    assert NativeSampler(params, [7], 100).sample(logits, portable_instructions) == [NO_TOKEN]
    with pytest.raises(EngineError, match="not finite"):
        Sampler(params, [7], 100, "cpu").sample(logits[0])


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_the_nth_token_uses_the_nth_number(portable_instructions: str, seed: int) -> None:
    """Any seed gives the stream of Python's generator, so all samplers draw with the same numbers."""
    logits = torch.zeros(1, 1000)  # equal weights: the token is the number's thousandth
    native = NativeSampler(GenerationParams(1, 1.0, 1.0, seed=seed), [], 1000)
    numbers = random.Random(seed)
    expected = [int(1000 * numbers.random()) for _ in range(1000)]
    assert native.sample(logits.expand(1000, -1), portable_instructions) == expected


def test_equal_logits_are_taken_by_lower_id(portable_instructions: str) -> None:
    """This holds for greedy tokens and for the order of the nucleus; 0 and -0 are equal."""
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0] * 20])
    assert NativeSampler(GenerationParams(1, 0.0), [], 100).sample(logits, portable_instructions) == [1]
    # The nucleus is the first half of the 80 zeros.
    params = GenerationParams(1, 1e-3, 0.5)
    drawn = NativeSampler(params, [], 100).sample(logits.expand(2000, -1), portable_instructions)
    assert sorted(set(drawn)) == [token_id for token_id in range(50) if token_id % 5]


def test_a_sampler_rejects_tokens_that_do_not_exist() -> None:
    """Penalties never write to other memory."""
    library()
    for token_id in (-1, 100):
        with pytest.raises(EngineError, match="a prompt token is not below 100"):
            NativeSampler(replace(PARAMS["penalties"]), [token_id], 100)
    with pytest.raises(EngineError, match="cannot sample with SSE9"):
        NativeSampler(PARAMS["default"], [], 100).sample(torch.zeros(1, 100), "SSE9")
