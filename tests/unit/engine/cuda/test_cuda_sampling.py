"""Tests of batched sampling against the probabilities of transformers and against single rows."""

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import pytest
import torch
from tests.support.sampling.transformers_oracle import HISTORY, PROMPT, expected_probabilities

from llama2_server.engine.cuda.sampling import (
    NO_TOKEN,
    BatchSamplingParams,
    PenaltyState,
    greedy,
    has_penalties,
    is_argmax,
    sample,
)
from llama2_server.engine.sampling import GenerationParams, Sampler

VOCAB_SIZE = 40
DRAWS = 20_000
PLAIN = GenerationParams(max_tokens=1, temperature=1.0, top_p=1.0)
PARAMS = {
    "temperature": replace(PLAIN, temperature=0.6),
    "hot": replace(PLAIN, temperature=2.0),
    "top_k": replace(PLAIN, top_k=5),
    "top_k beyond the vocabulary": replace(PLAIN, top_k=1000),
    "top_p": replace(PLAIN, top_p=0.8),
    "small top_p": replace(PLAIN, top_p=0.01),
    "repetition": replace(PLAIN, repetition_penalty=1.7),
    "frequency": replace(PLAIN, frequency_penalty=1.2),
    "presence rewarded": replace(PLAIN, presence_penalty=-1.5, frequency_penalty=-0.3),
    "everything": GenerationParams(1, 0.7, 0.9, 20, 0, 1.2, 0.4, 0.3),
}


def batch_params(params: SequenceOf[GenerationParams], uniforms: SequenceOf[float]) -> BatchSamplingParams:
    rows = [
        (p.temperature, p.top_k, p.top_p, p.repetition_penalty, p.frequency_penalty, p.presence_penalty, uniform)
        for p, uniform in zip(params, uniforms, strict=True)
    ]
    table = torch.tensor(rows, dtype=torch.float64)
    return BatchSamplingParams(*(table[:, column : column + 1] for column in range(table.shape[1])))


def penalty_state(slots: int) -> PenaltyState:
    """Return the state in which every slot got PROMPT and generated HISTORY, after an earlier sequence."""
    state = PenaltyState(slots, VOCAB_SIZE, torch.device("cpu"))
    every = torch.arange(slots)
    state.reset(0, [7, 8])
    state.add_tokens(every, torch.full((slots,), 9))
    for slot in range(slots):
        state.reset(slot, PROMPT)
    for token_id in HISTORY:
        state.add_tokens(every, torch.full((slots,), token_id))
    return state


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_draws_are_the_inverse_of_the_distribution(params: GenerationParams) -> None:
    """Evenly spaced uniform numbers give each token its exact share, except for one draw at each end."""
    uniforms = [(index + 0.5) / DRAWS for index in range(DRAWS)]
    rows = batch_params([params] * DRAWS, uniforms)
    for seed in range(3):
        logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2
        slots = torch.zeros(DRAWS, dtype=torch.long)
        drawn = sample(penalty_state(1).apply_penalties(logits.expand(DRAWS, -1), slots, rows), rows)
        found = torch.bincount(drawn, minlength=VOCAB_SIZE)
        expected = expected_probabilities(params, logits, HISTORY) * DRAWS
        assert (found - expected).abs().max() <= 2
        assert found[expected == 0].sum() == 0


def test_rows_of_a_step_are_independent() -> None:
    """Rows with different parameters, slots and histories share a step and get the same tokens as alone."""
    logits = torch.randn(len(PARAMS), VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 2
    uniforms = torch.rand(len(PARAMS), generator=torch.Generator().manual_seed(2)).tolist()
    state, slots = penalty_state(len(PARAMS)), torch.arange(len(PARAMS)).flip(0)
    rows = batch_params(list(PARAMS.values()), uniforms)
    together = sample(state.apply_penalties(logits, slots, rows), rows)
    for index, params in enumerate(PARAMS.values()):
        row = batch_params([params], uniforms[index : index + 1])
        alone = sample(state.apply_penalties(logits[index : index + 1], slots[index : index + 1], row), row)
        assert together[index] == alone[0]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_token_without_weight_is_never_drawn(uniform: float) -> None:
    """This holds at both ends of the range, and if only one token has a weight."""
    row = batch_params([replace(PLAIN, temperature=0.01)], [uniform])
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 11] = 1000.0
    assert sample(logits, row).tolist() == [11]


def test_greedy_rows_take_the_likeliest() -> None:
    """A step that samples at temperature 0 and a greedy step return the same tokens."""
    logits = torch.randn(8, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    rows = batch_params([replace(PLAIN, temperature=0, top_k=3, top_p=0.5)] * 8, [0.99] * 8)
    assert torch.equal(sample(logits, rows), logits.argmax(dim=1))
    assert torch.equal(greedy(logits), logits.argmax(dim=1))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_non_finite_logits_has_no_token(broken: float) -> None:
    """The other rows keep their tokens."""
    logits = torch.randn(3, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    expected = logits.argmax(dim=1)
    logits[1, 5] = broken
    rows = batch_params([replace(PLAIN, temperature=0.001)] * 3, [0.5] * 3)
    for found in (greedy(logits), sample(logits, rows)):
        assert found.tolist() == [expected[0], NO_TOKEN, expected[2]]


@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("params", [replace(p, seed=seed) for p in PARAMS.values() for seed in (0, 1)])
def test_tokens_equal_the_reference_sampler(params: GenerationParams, scale: int) -> None:
    """Logits with many equal values give the tokens of the reference, which orders equal ones by id."""
    logits = (torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 2).round() / scale
    reference, uniforms = Sampler(params, PROMPT, VOCAB_SIZE, "cpu"), random.Random(params.seed)
    state, slot = PenaltyState(1, VOCAB_SIZE, torch.device("cpu")), torch.tensor([0])
    state.reset(0, PROMPT)
    for _ in range(50):
        row = batch_params([params], [uniforms.random()])
        token_ids = sample(state.apply_penalties(logits[None], slot, row), row)
        state.add_tokens(slot, token_ids)
        assert int(token_ids) == reference.sample(logits)


def test_finite_logits_with_an_infinite_sum_give_a_token() -> None:
    """Only a logit itself can be an error, not the sum of many large ones."""
    logits = torch.full((1, VOCAB_SIZE), -3e38)
    logits[0, 5] = 3e38
    assert greedy(logits).tolist() == sample(logits, batch_params([PLAIN], [0.5])).tolist() == [5]


def test_which_requests_need_more_than_argmax() -> None:
    """Greedy requests without penalties need only the largest logit."""
    assert is_argmax(replace(PLAIN, temperature=0))
    assert not is_argmax(PLAIN)
    assert not is_argmax(replace(PLAIN, temperature=0, presence_penalty=0.1))
    assert not has_penalties(PLAIN)
