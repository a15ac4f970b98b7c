"""Reading config.json and generation_config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.checkpoints import config, edit_json
from torch import Tensor

from llama2_server.engine.checkpoint.files import read_config, read_eos_ids
from llama2_server.engine.errors import WeightsError
from llama2_server.engine.model.weights import LlamaWeights


@pytest.mark.parametrize(
    ("generation", "fallback", "expected"),
    [
        ({"eos_token_id": 2}, 7, {2}),
        ({"eos_token_id": [2, 5]}, 7, {2, 5}),
        ({}, 7, {7}),
        (None, 7, {7}),
        (None, [7, 8], {7, 8}),
    ],
)
def test_end_of_sequence_ids(copy: Path, generation: dict[str, Any] | None, fallback: Any, expected: set[int]) -> None:
    """generation_config.json decides, with one or several ids; config.json is the fallback."""
    (copy / "generation_config.json").unlink()
    if generation is not None:
        (copy / "generation_config.json").write_text(json.dumps(generation))
    config(eos_token_id=fallback)(copy)
    assert read_eos_ids(copy, 600) == expected


@pytest.mark.parametrize("eos", [None, [], "two", True])
def test_a_model_without_end_of_sequence_is_rejected(copy: Path, eos: Any) -> None:
    """Without an end-of-sequence id no reply would end by itself."""
    (copy / "generation_config.json").unlink()
    config(eos_token_id=eos)(copy)
    with pytest.raises(WeightsError, match=r"eos_token_id is .*, expected token ids that end a reply; set it in"):
        read_eos_ids(copy, 600)


def test_a_broken_generation_config_is_named(copy: Path) -> None:
    """The error for an invalid generation_config.json contains its path."""
    (copy / "generation_config.json").write_text("rubbish")
    with pytest.raises(WeightsError, match=r"generation_config\.json: not valid JSON"):
        read_eos_ids(copy, 600)


@pytest.mark.parametrize("token_id", [600, -1, 32000])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_end_outside_the_vocabulary_is_rejected(copy: Path, name: str, token_id: int) -> None:
    """The engine could never generate this id, so a reply would always have the maximum length."""
    if name == "config.json":
        (copy / "generation_config.json").unlink()
    edit_json(copy, name, eos_token_id=[2, token_id])
    with pytest.raises(
        WeightsError, match=rf"{name}: eos_token_id is {token_id}, expected an id below vocab_size, 600; set it"
    ):
        read_eos_ids(copy, 600)


@pytest.mark.parametrize(
    ("entry", "value"), [("watermarking_config", {"x": 1}), ("compile_config", "fast"), ("cache_implementation", "x")]
)
def test_a_generation_config_that_transformers_rejects(copy: Path, entry: str, value: Any) -> None:
    """One line names the file, the reason by transformers and the two remedies."""
    edit_json(copy, "generation_config.json", **{entry: value})
    with pytest.raises(
        WeightsError, match=r"generation_config\.json: transformers rejects it \(\w+: .*\); correct .*, or remove"
    ) as rejection:
        read_eos_ids(copy, 600)
    assert "\n" not in str(rejection.value)


def test_the_config_of_llama_2_7b_chat_is_read(tmp_path: Path) -> None:
    """The published config.json of Llama-2-7b-chat-hf."""
    published = {
        "_name_or_path": "meta-llama/Llama-2-7b-chat-hf",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.32.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    found = read_config(tmp_path)
    assert (found.layers, found.heads, found.kv_heads, found.head_dim) == (32, 32, 32, 128)
    assert (found.rope_theta, found.rms_norm_eps, found.max_positions) == (10000.0, 1e-5, 4096)
    meta = LlamaWeights.allocate(found, "meta", torch.float16)
    layer = meta.layers[0]
    parts = (layer.attention_norm, layer.qkv, layer.output, layer.mlp_norm, layer.gate_up, layer.down)
    # The published number of parameters.
    total = 32 * sum(map(Tensor.numel, parts)) + meta.embedding.numel() + meta.norm.numel() + meta.head.numel()
    assert total == 6_738_415_616
