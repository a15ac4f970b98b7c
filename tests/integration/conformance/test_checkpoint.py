"""The made checkpoint under transformers, which this repository did not write."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.service import script
from conformance.service.checkpoint import TOKENIZER, make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder)
    return folder


def test_transformers_says_the_scripted_texts(checkpoint: Path) -> None:
    """The library generates the scripted text, greedy and at the highest temperature."""
    from transformers import AutoModelForCausalLM, LlamaTokenizer

    tokenizer: Any = LlamaTokenizer.from_pretrained(checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt, pieces in [("count", script.RAW["▁count"]), ("poet", script.RAW["▁poet"]), ("always", script.LOOP)]:
        inputs = tokenizer(prompt, return_tensors="pt")
        for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 5.0, "top_k": 0}):
            output = model.generate(**inputs, max_new_tokens=24, **sampling)[0, inputs["input_ids"].shape[1] :]
            assert tokenizer.convert_ids_to_tokens(output)[: len(pieces)] == pieces


def test_the_tokenizer_belongs_to_the_kit(checkpoint: Path) -> None:
    """The cases count tokens, so the kit has its own tokenizer, which does not change with the demo model."""
    assert (checkpoint / "tokenizer.model").read_bytes() == (TOKENIZER / "tokenizer.model").read_bytes()
    assert TOKENIZER.is_relative_to(Path(script.__file__).parent)


def test_a_token_has_one_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that occurs twice in the texts is rejected by name."""
    monkeypatch.setattr(script, "LOOP", [*script.LOOP, "▁three"])
    with pytest.raises(ValueError, match="▁three has two successors"):
        script.successors()
