"""The sampler against transformers' logits processors, and its draws against exact probabilities."""

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from tests.support.sampling.transformers_oracle import HISTORY, PROMPT, expected_probabilities, processors
from torch import Tensor

from llama2_server.engine.errors import EngineError
from llama2_server.engine.sampling import GenerationParams, Sampler

PLAIN = GenerationParams(max_tokens=1, temperature=1.0, top_p=1.0)
DRAWS = 1000


def logits_of(vocab_size: int, seed: int = 0) -> Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


def sampler_with_history(params: GenerationParams, vocab_size: int, history: list[int]) -> Sampler:
    """Return a sampler that has generated `history` after PROMPT, each token forced by its logit."""
    sampler = Sampler(params, PROMPT, vocab_size, "cpu")
    for token_id in history:
        forced = torch.full((vocab_size,), -1e4)
        forced[token_id] = 1e4
        assert sampler.sample(forced) == token_id
    return sampler


def probabilities(params: GenerationParams, logits: Tensor, history: list[int]) -> Tensor:
    sampler = sampler_with_history(params, len(logits), history)
    token_ids, weights = sampler._distribution(sampler._penalize(logits))
    found = torch.zeros(len(logits), dtype=torch.float64)
    found[token_ids] = weights / weights.sum()
    return found


PARAMS = {
    "temperature": replace(PLAIN, temperature=0.6),
    "hot": replace(PLAIN, temperature=2.0),
    "top_k": replace(PLAIN, top_k=5),
    "top_k of one": replace(PLAIN, top_k=1),
    "top_p": replace(PLAIN, top_p=0.8),
    "small top_p": replace(PLAIN, top_p=0.01),
    "repetition": replace(PLAIN, repetition_penalty=1.7),
    "repetition rewarded": replace(PLAIN, repetition_penalty=0.6),
    "frequency": replace(PLAIN, frequency_penalty=1.2),
    "presence": replace(PLAIN, presence_penalty=1.5),
    "presence rewarded": replace(PLAIN, presence_penalty=-1.5, frequency_penalty=-0.3),
    "everything": GenerationParams(1, 0.7, 0.9, 20, 0, 1.2, 0.4, 0.3),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
@pytest.mark.parametrize("vocab_size", [12, 4000])
def test_the_distribution_is_that_of_transformers(params: GenerationParams, vocab_size: int) -> None:
    """The possible next tokens and their probabilities are the same as in transformers."""
    for seed in range(10):
        logits = logits_of(vocab_size, seed)
        found = probabilities(params, logits, HISTORY)
        expected = expected_probabilities(params, logits, HISTORY)
        assert torch.equal(found > 0, expected > 0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99, 0.9999])
def test_the_nucleus_of_flat_logits(top_p: float) -> None:
    """For flat logits the nucleus is a large part of the vocabulary."""
    params, logits = replace(PLAIN, top_p=top_p), logits_of(2048) / 100
    found, expected = probabilities(params, logits, []), expected_probabilities(params, logits, [])
    assert torch.equal(found > 0, expected > 0)


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=30), top_k=st.integers(1, 30))
def test_ties_at_top_k_are_all_kept(values: list[int], top_k: int) -> None:
    """float16 logits are often equal; all that equal the smallest kept logit are kept, as in transformers."""
    params, logits = replace(PLAIN, top_k=top_k), torch.tensor(values, dtype=torch.float32)
    sampler = Sampler(params, [], len(values), "cpu")
    token_ids, _ = sampler._distribution(logits)
    expected = processors(params)(torch.LongTensor([[0]]), logits[None])[0].isfinite().nonzero()[:, 0]
    assert torch.equal(token_ids, expected)


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_draws_follow_the_distribution(params: GenerationParams) -> None:
    """With many seeds, tokens are drawn with their exact probabilities (chi-square test)."""
    logits = logits_of(12)
    seeds = random.Random(0)
    samplers = (sampler_with_history(replace(params, seed=seeds.getrandbits(64)), 12, HISTORY) for _ in range(DRAWS))
    drawn = torch.bincount(torch.tensor([sampler.sample(logits) for sampler in samplers]), minlength=12)
    expected = expected_probabilities(params, logits, HISTORY) * DRAWS
    assert drawn[expected == 0].sum() == 0
    likely = expected > 0
    assert not likely.sum() > 1 or chisquare(drawn[likely], expected[likely]).pvalue > 1e-3


def test_one_stream_of_draws_follows_the_distribution() -> None:
    """The tokens of one long sequence are independent draws."""
    logits, sampler = logits_of(12), Sampler(replace(PLAIN, seed=2**64 - 1), [], 12, "cpu")
    drawn = torch.bincount(torch.tensor([sampler.sample(logits) for _ in range(5000)]), minlength=12)
    assert chisquare(drawn, logits.double().softmax(0) * 5000).pvalue > 1e-3


def test_draws_invert_the_cumulative_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest and the largest uniform number give the first and the last token with a nonzero weight."""
    # Probabilities of 0, 0.09, 0.24, 0.67 and 0. A token with probability 0 is never drawn, at neither end.
    logits = torch.tensor([-1e4, 0.0, 1.0, 2.0, -1e4])
    for uniform, expected in ((0.0, 1), (math.nextafter(1, 0), 3), (0.5, 3), (0.1, 2)):
        sampler = Sampler(PLAIN, [], 5, "cpu")
        monkeypatch.setattr(sampler, "_uniform", lambda uniform=uniform: uniform)
        assert sampler.sample(logits) == expected


@given(values=st.lists(st.sampled_from([-1.0, -0.0, 0.0, 2.0]), min_size=1, max_size=60), top_k=st.integers(0, 5))
def test_equal_logits_are_ordered_by_id(values: list[float], top_k: int) -> None:
    """Greedy tokens and the nucleus take the lower id first; -0 equals 0. Without a nucleus all are ordered by id."""
    logits = torch.tensor(values)
    by_logit = sorted(range(len(values)), key=lambda token_id: (-values[token_id], token_id))
    assert Sampler(replace(PLAIN, temperature=0.0), [], len(values), "cpu").sample(logits) == by_logit[0]
    token_ids, _ = Sampler(replace(PLAIN, top_p=1 - 2**-53), [], len(values), "cpu")._distribution(logits)
    assert token_ids.tolist() == by_logit[: len(token_ids)]
    token_ids, _ = Sampler(replace(PLAIN, top_k=top_k), [], len(values), "cpu")._distribution(logits)
    assert token_ids.tolist() == sorted(token_ids.tolist())


def test_a_large_vocabulary_keeps_the_order_of_equal_logits() -> None:
    """Torch selects another sorting algorithm for many logits."""
    logits = logits_of(32_000).round()
    token_ids, _ = Sampler(replace(PLAIN, top_p=0.9), [], 32_000, "cpu")._distribution(logits)
    values = logits.tolist()
    by_logit = sorted(range(32_000), key=lambda token_id: (-values[token_id], token_id))
    assert token_ids.tolist() == by_logit[: len(token_ids)]


def test_the_nth_token_uses_the_nth_number() -> None:
    """With equal weights, a number between 0 and 1 is the token's share of the vocabulary."""
    numbers, sampler = random.Random(2**64 - 1), Sampler(replace(PLAIN, seed=2**64 - 1), [], 1000, "cpu")
    logits = torch.zeros(1000)
    assert [sampler.sample(logits) for _ in range(100)] == [int(1000 * numbers.random()) for _ in range(100)]


def test_a_seed_repeats_exactly() -> None:
    """The same seed gives the same tokens, and other seeds give other tokens."""

    def tokens(seed: int) -> list[int]:
        sampler = Sampler(replace(PLAIN, seed=seed), [], 100, "cpu")
        return [sampler.sample(logits_of(100, step)) for step in range(30)]

    assert tokens(7) == tokens(7)
    assert len({tuple(tokens(seed)) for seed in (0, 1, 2, 2**32, 2**63, 2**64 - 1)}) == 6


@pytest.mark.parametrize("penalties", [PLAIN, PARAMS["everything"]], ids=["none", "all"])
def test_temperature_zero_is_greedy(penalties: GenerationParams) -> None:
    """Greedy decoding returns the most likely token after penalties, for any top_k, top_p and seed."""
    params = replace(penalties, temperature=0.0, top_p=0.5, top_k=2, seed=99)
    sampler = Sampler(params, PROMPT, 50, "cpu")
    history: list[int] = []
    for step in range(40):
        logits = logits_of(50, seed=step // 20) / 4
        expected = int(expected_probabilities(replace(params, top_k=0, top_p=1), logits, history).argmax())
        history.append(sampler.sample(logits))
        assert history[-1] == expected


def test_greedy_without_penalties_does_no_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """No random number is drawn, and no tensor with the size of the vocabulary is kept."""
    monkeypatch.setattr(Sampler, "_draw", None)
    sampler, logits = Sampler(replace(PLAIN, temperature=0.0), PROMPT, 8, "cpu"), logits_of(8)
    assert sampler._penalize(logits) is logits
    assert sampler.sample(logits) == logits.argmax()


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-3])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_a_tiny_temperature_is_greedy(temperature: float, scale: float) -> None:
    """Temperatures close to zero and large logits cause no overflow."""
    logits = logits_of(50) * scale
    assert Sampler(replace(PLAIN, temperature=temperature, top_p=0.9), [], 50, "cpu").sample(logits) == logits.argmax()


@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error(temperature: float, bad: float) -> None:
    """A single logit that is not finite raises EngineError and never gives a token."""
    logits = logits_of(1000)
    logits[500] = bad
    with pytest.raises(EngineError, match="not finite"):
        Sampler(replace(PLAIN, temperature=temperature), [], 1000, "cpu").sample(logits)


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_finite_logits_with_an_infinite_sum_give_a_token(temperature: float) -> None:
    """Only a logit itself can be an error, not the sum of many large ones."""
    logits = torch.full((1000,), -3e38)
    logits[5] = 3e38
    assert Sampler(replace(PLAIN, temperature=temperature), [], 1000, "cpu").sample(logits) == 5


def test_a_penalty_that_makes_a_logit_infinite_is_an_error() -> None:
    """It would leave no weights to draw from."""
    logits = torch.full((10,), 3e38)
    with pytest.raises(EngineError, match="not finite"):
        Sampler(replace(PLAIN, repetition_penalty=0.5), [3], 10, "cpu").sample(logits)


def test_logits_are_not_changed() -> None:
    """Sampling does not write to its input tensor."""
    logits = logits_of(50)
    before = logits.clone()
    sampler = sampler_with_history(PARAMS["everything"], 50, HISTORY)
    sampler.sample(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_converted_to_float32(dtype: torch.dtype) -> None:
    """16-bit logits are sampled as their float32 values."""
    logits = logits_of(200).to(dtype)
    wide, narrow = Sampler(PARAMS["everything"], [], 200, "cpu"), Sampler(PARAMS["everything"], [], 200, "cpu")
    assert [narrow.sample(logits) for _ in range(20)] == [wide.sample(logits.float()) for _ in range(20)]
