"""The made checkpoint whose replies repeat passages."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tools.make_checkpoint import Shape, make_checkpoint
from transformers import LlamaForCausalLM

CYCLE = 64
FOLLOWED = 0.9


@pytest.mark.parametrize("shape", [Shape(), Shape(hidden=512, layers=12, heads=8, kv_heads=8, ffn=1024, vocab=8192)])
def test_the_copying_model_follows_its_cycles(tmp_path: Path, shape: Shape) -> None:
    """Deep and wide models do it as well as tiny ones, at any position of a text."""
    shape = replace(shape, cycle=CYCLE)
    model = LlamaForCausalLM.from_pretrained(make_checkpoint(tmp_path, shape), dtype=torch.float32)
    token_ids = torch.arange(CYCLE, 3 * CYCLE)
    with torch.inference_mode():
        chances = torch.softmax(model(token_ids[None]).logits[0], dim=-1)
    following = token_ids - token_ids % CYCLE + (token_ids + 1) % CYCLE
    assert chances[torch.arange(len(token_ids)), following].mean() > FOLLOWED
