"""The tables of sines and cosines: an error in the last bit of a sine or a cosine changes no number."""

import math

import pytest
import torch
from torch import Tensor

from llama2_server.engine.model.llama import _rotary_table
from llama2_server.engine.model.weights import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=1,
    hidden_size=256,
    intermediate_size=1,
    layers=1,
    heads=4,
    kv_heads=4,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=1024,
    tied_embeddings=True,
)


@pytest.mark.parametrize("direction", [-2.0, 2.0])
def test_last_bits_change_no_number(monkeypatch: pytest.MonkeyPatch, direction: float) -> None:
    """Servers with equal weights and kernels have equal tables, and so equal fingerprints."""
    like = torch.empty(0, dtype=torch.float16)
    expected = _rotary_table(CONFIG, CONFIG.max_positions, like)
    cosine, sine = math.cos, math.sin
    monkeypatch.setattr(math, "cos", lambda angle: math.nextafter(cosine(angle), direction))
    monkeypatch.setattr(math, "sin", lambda angle: math.nextafter(sine(angle), direction))
    assert all(map(torch.equal, expected, _rotary_table(CONFIG, CONFIG.max_positions, like)))


def test_the_table_does_not_use_the_functions_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In rare starts, these gave other tables on the same processor."""
    for name in ("cos", "sin", "exp", "pow", "__pow__", "__rpow__"):
        monkeypatch.setattr(Tensor, name, None)
    cosines, sines = _rotary_table(CONFIG, 2, torch.empty(0, dtype=torch.float64))
    assert cosines[1, [0, 1]].tolist() == [math.cos(1), math.cos(float(torch.tensor(1 / 10000 ** (2 / 64))))]
    assert sines[1, [0, 32]].tolist() == [-math.sin(1), math.sin(1)]
