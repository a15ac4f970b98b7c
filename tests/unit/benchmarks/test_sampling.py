"""The sampler of peers that return logits."""

from collections import Counter

import numpy as np
import pytest
import torch
from benchmarks.workers import protocol
from benchmarks.workers.sampling import CANDIDATES, NucleusSampler
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from llama2_server.card import load_card


def test_the_default_request_is_the_cards() -> None:
    """Peers sample as the card does."""
    config = load_card("llama-2-7b-chat-fp16").generation_config
    assert (config.temperature, config.top_p) == (protocol.TEMPERATURE, protocol.TOP_P)


@pytest.mark.parametrize("deviation", [0.3, 4.0])
def test_only_the_nucleus_is_drawn(deviation: float) -> None:
    """The drawn tokens are those that transformers leaves, also if the nucleus is large."""
    logits = np.random.default_rng(1).normal(0, deviation, 2000).astype(np.float32)
    warped = TemperatureLogitsWarper(protocol.TEMPERATURE)(torch.tensor([[0]]), torch.tensor(logits)[None])
    kept = TopPLogitsWarper(protocol.TOP_P)(torch.tensor([[0]]), warped)[0].isfinite().nonzero().flatten().tolist()
    assert (len(kept) > CANDIDATES) == (deviation < 1)
    sampler = NucleusSampler(seed=3)
    drawn = Counter(sampler.sample(logits) for _ in range(20_000))
    assert set(drawn) <= set(kept)
    expected = torch.softmax(warped[0].double(), 0)
    likeliest = int(logits.argmax())
    assert drawn[likeliest] / 20_000 == pytest.approx(float(expected[likeliest] / expected[kept].sum()), abs=0.02)


def test_without_a_seed_the_best_token_is_taken() -> None:
    """Greedy requests use no random number."""
    assert NucleusSampler(None).sample(np.array([1.0, 3.0, 2.0], dtype=np.float32)) == 1
