"""Sampling of many rows at once against transformers' probabilities and against the sampler of one row."""

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import pytest
import torch
from tests.support.transformers_oracle import HISTORY, PROMPT, expected_probabilities

from llama2_server.engine.cuda.sampling import NO_TOKEN, PenaltyState, RowParams, draw, greedy, is_penalised, is_plain
from llama2_server.engine.sampling import GenerationParams

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


def row_params(params: SequenceOf[GenerationParams], uniforms: SequenceOf[float]) -> RowParams:
    lines = [
        (p.temperature, p.top_k, p.top_p, p.repetition_penalty, p.frequency_penalty, p.presence_penalty, uniform)
        for p, uniform in zip(params, uniforms, strict=True)
    ]
    table = torch.tensor(lines, dtype=torch.float64)
    return RowParams(*(table[:, column : column + 1] for column in range(table.shape[1])))


def seen_so_far(slots: int) -> PenaltyState:
    """Every slot has got PROMPT and generated HISTORY; another sequence had it before."""
    seen = PenaltyState(slots, VOCAB_SIZE, torch.device("cpu"))
    every = torch.arange(slots)
    seen.begin(0, [7, 8])
    seen.add(every, torch.full((slots,), 9))
    for slot in range(slots):
        seen.begin(slot, PROMPT)
    for token_id in HISTORY:
        seen.add(every, torch.full((slots,), token_id))
    return seen


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_draws_are_the_inverse_of_the_distribution(params: GenerationParams) -> None:
    """Evenly spaced uniform numbers give each token exactly its share, to the one draw at each of its two ends."""
    uniforms = [(index + 0.5) / DRAWS for index in range(DRAWS)]
    rows = row_params([params] * DRAWS, uniforms)
    for seed in range(3):
        logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2
        slots = torch.zeros(DRAWS, dtype=torch.long)
        drawn = draw(seen_so_far(1).penalised(logits.expand(DRAWS, -1), slots, rows), rows)
        found = torch.bincount(drawn, minlength=VOCAB_SIZE)
        expected = expected_probabilities(params, logits, HISTORY) * DRAWS
        assert (found - expected).abs().max() <= 2
        assert found[expected == 0].sum() == 0


def test_rows_of_a_step_do_not_touch_one_another() -> None:
    """Rows with other parameters, slots and histories share a step; each gets what it gets alone."""
    logits = torch.randn(len(PARAMS), VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 2
    uniforms = torch.rand(len(PARAMS), generator=torch.Generator().manual_seed(2)).tolist()
    seen, slots = seen_so_far(len(PARAMS)), torch.arange(len(PARAMS)).flip(0)
    rows = row_params(list(PARAMS.values()), uniforms)
    together = draw(seen.penalised(logits, slots, rows), rows)
    for index, params in enumerate(PARAMS.values()):
        row = row_params([params], uniforms[index : index + 1])
        alone = draw(seen.penalised(logits[index : index + 1], slots[index : index + 1], row), row)
        assert together[index] == alone[0]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_token_without_weight_is_never_drawn(uniform: float) -> None:
    """Not at either end of the draw, and not where all weights but one vanish."""
    row = row_params([replace(PLAIN, temperature=0.01)], [uniform])
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 11] = 1000.0
    assert draw(logits, row).tolist() == [11]


def test_greedy_rows_take_the_likeliest() -> None:
    """Temperature 0 in a step that samples, and a step of greedy rows only, say the same."""
    logits = torch.randn(8, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    rows = row_params([replace(PLAIN, temperature=0, top_k=3, top_p=0.5)] * 8, [0.99] * 8)
    assert torch.equal(draw(logits, rows), logits.argmax(dim=1))
    assert torch.equal(greedy(logits), logits.argmax(dim=1))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_no_number_has_no_token(broken: float) -> None:
    """And its neighbours keep theirs."""
    logits = torch.randn(3, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    expected = logits.argmax(dim=1)
    logits[1, 5] = broken
    rows = row_params([replace(PLAIN, temperature=0.001)] * 3, [0.5] * 3)
    for found in (greedy(logits), draw(logits, rows)):
        assert found.tolist() == [expected[0], NO_TOKEN, expected[2]]


def test_what_a_step_must_look_at() -> None:
    """Greedy requests without penalties need no more than the largest logit."""
    assert is_plain(replace(PLAIN, temperature=0))
    assert not is_plain(PLAIN)
    assert not is_plain(replace(PLAIN, temperature=0, presence_penalty=0.1))
    assert not is_penalised(PLAIN)
