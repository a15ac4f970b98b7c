"""Checkpoints that the server cannot serve are rejected with the name of the file or tensor."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.checkpoints import Edit, config, only_pickles, overwrite, remove, tensors, truncate
from tests.unit.engine.checkpoint.loading import load
from tools.make_checkpoint import make_tokenizer

from llama2_server.engine.errors import WeightsError
from llama2_server.engine.model.weights import LlamaWeights

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
K_PROJ = "model.layers.0.self_attn.k_proj.weight"
WRONG_DIGEST = b"0" * 64 + b"  model.safetensors\n"

REJECTED: dict[str, tuple[Edit, str]] = {
    "no config": (remove("config.json"), r"config\.json: no such file"),
    "config is not JSON": (overwrite("config.json", b"{"), r"config\.json: not valid JSON"),
    "config is not UTF-8": (overwrite("config.json", b"\xff\xfe{"), r"config\.json: not valid JSON"),
    "config is a list": (overwrite("config.json", b"[]"), r"config\.json: contains a JSON list, expected an object"),
    "another architecture": (
        config(architectures=["MistralForCausalLM"]),
        r"\['Mistral.* expected \['Llama.*; pass a Llama checkpoint$",
    ),
    "no architecture": (config(architectures=None), r"architectures is None"),
    "another model type": (config(model_type="mistral"), r"model_type 'mistral'"),
    "quantized": (
        config(quantization_config={"quant_method": "gptq"}),
        r"the weights are quantized with GPTQ \(quantization_config\); pass a checkpoint with unquantized weights",
    ),
    "scaled rotary embedding": (config(rope_scaling={"type": "linear", "factor": 2.0}), r"rope_scaling is 'linear'"),
    "attention bias": (config(attention_bias=True), r"attention_bias is True, expected False"),
    "mlp bias": (config(mlp_bias=True), r"mlp_bias is True, expected False"),
    "another activation": (config(hidden_act="gelu"), r"hidden_act is 'gelu', expected 'silu'"),
    "a text as a size": (config(hidden_size="large"), r"config\.json: .*hidden_size"),
    "no layers": (config(num_hidden_layers=0), r"num_hidden_layers is 0, expected a positive integer"),
    "a billion layers": (config(num_hidden_layers=10**9), r"num_hidden_layers is 1000000000, expected at most 1024"),
    "a huge vocabulary": (config(vocab_size=10**12), r"vocab_size is 1000000000000, expected at most 1048576"),
    "no rotary base": (config(rope_theta=0), r"rope_theta is 0(\.0)?, expected a number in \[1, 1e\+12\]"),
    "a negative epsilon": (config(rms_norm_eps=-1.0), r"rms_norm_eps is -1\.0, expected a number in \[0, 1\]"),
    "deeply nested JSON": (overwrite("config.json", b"[" * 100_000), r"config\.json: not valid JSON: .*recursion"),
    "a wrong digest": (
        overwrite("SHA256SUMS", WRONG_DIGEST),
        r"model\.safetensors: its SHA-256 digest is [0-9a-f]{64}",
    ),
    "a digest file without the weights": (
        overwrite("SHA256SUMS", b""),
        r"SHA256SUMS: does not list model\.safetensors",
    ),
    "not a digest file": (overwrite("SHA256SUMS", b"rubbish"), r"SHA256SUMS: line 1 is not a digest and a file name"),
    "no heads": (config(num_attention_heads=0), r"config\.json: "),
    "indivisible key heads": (config(num_key_value_heads=3), r"num_key_value_heads is 1, expected 0"),
    "an odd head": (config(head_dim=15), r"config\.json: .*head_dim.*15"),
    "a short context": (
        config(max_position_embeddings=16),
        r"max_position_embeddings is 16, expected at least 32; .* set --max-position-embeddings; otherwise lower",
    ),
    "no tokenizer": (remove("tokenizer.model"), r"tokenizer\.model: no such file, and no tokenizer\.json; copy either"),
    "a broken tokenizer": (overwrite("tokenizer.model", b"rubbish"), r"tokenizer\.model: not a SentencePiece model"),
    "a larger tokenizer": (
        lambda directory: make_tokenizer(directory / "tokenizer.model", 601),
        r"tokenizer\.model: has 601 tokens, expected at most 600, the rows of the embedding; ",
    ),
    "no weights": (remove("model.safetensors"), r"has neither model\.safetensors nor model\.safetensors\.index\.json"),
    "only pickles": (only_pickles, r"only pickle files \(pytorch_model\.bin\), .* safetensors files, or convert"),
    "not safetensors": (overwrite("model.safetensors", b"rubbish"), r"model\.safetensors: not a complete safetensors"),
    "an empty file": (overwrite("model.safetensors", b""), r"model\.safetensors: not a complete safetensors"),
    "a truncated file": (truncate("model.safetensors"), r"model\.safetensors: not a complete safetensors"),
    "a missing tensor": (
        tensors(lambda t: t.pop(K_PROJ)),
        rf"tensor {K_PROJ} of shape \(64, 64\) is missing; fetch the checkpoint again",
    ),
    "an extra tensor": (
        tensors(lambda t: t.update({"model.layers.0.self_attn.k_proj.bias": torch.ones(64)})),
        r"model\.safetensors: tensor model\.layers\.0\.self_attn\.k_proj\.bias is not part of a Llama",
    ),
    "a tensor with another shape": (
        tensors(lambda t: t.update({K_PROJ: torch.ones(32, 64)})),
        rf"model\.safetensors: tensor {K_PROJ} has shape \(32, 64\), expected \(64, 64\); use",
    ),
    "more layers than in the config": (config(num_hidden_layers=1), r"tensor model\.layers\.1\..* is not part of"),
    "fewer layers than in the config": (
        config(num_hidden_layers=3),
        r"tensor model\.layers\.2\..* of shape .* is missing",
    ),
    "tied but with a head": (
        config(tie_word_embeddings=True),
        r"tensor lm_head\.weight differs from model\.embed_tokens\.weight",
    ),
    "integers": (
        tensors(lambda t: t.update({K_PROJ: torch.ones(64, 64, dtype=torch.int8)})),
        rf"{K_PROJ} has dtype I8, expected one of F16, BF16, F32",
    ),
}


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The devices on which weights were allocated."""
    devices: list[object] = []
    allocate = LlamaWeights.allocate

    def spy(config: Any, device: Any, dtype: Any) -> LlamaWeights[Any]:
        devices.append(device)
        return allocate(config, device, dtype)

    monkeypatch.setattr(LlamaWeights, "allocate", spy)
    return devices


def check_rejected(directory: Path, edit: Edit, message: str, allocated: list[object]) -> None:
    edit(directory)
    with pytest.raises(WeightsError, match=message) as rejection:
        load(directory)
    assert "\n" not in str(rejection.value)
    assert "cpu" not in allocated


@pytest.mark.parametrize(("edit", "message"), REJECTED.values(), ids=REJECTED.keys())
def test_unusable_checkpoints_are_rejected_by_name(
    copy: Path, allocated: list[object], edit: Edit, message: str
) -> None:
    """One line names the file or tensor, the found and the expected value, before memory is allocated."""
    check_rejected(copy, edit, message, allocated)


SHARDED_REJECTED: dict[str, tuple[Edit, str]] = {
    "a missing shard": (remove(SECOND), rf"{SECOND}: no such file, but model\.safetensors\.index\.json names it"),
    "a truncated shard": (truncate(FIRST), rf"{FIRST}: not a complete safetensors"),
    "a copy of another shard": (
        lambda directory: shutil.copy(directory / FIRST, directory / SECOND),
        rf"{SECOND}: contains tensor .*, which {FIRST} contains too; fetch both again",
    ),
    "an index that is not JSON": (overwrite("model.safetensors.index.json", b"]"), r"index\.json: not valid JSON"),
    "an empty index": (overwrite("model.safetensors.index.json", b"{}"), r"index\.json: has no weight_map"),
    "an index that leaves the directory": (
        overwrite("model.safetensors.index.json", b'{"weight_map": {"a": "../a.safetensors"}}'),
        r"names '\.\./a\.safetensors', expected a file in the same directory; fetch it again",
    ),
}


@pytest.mark.parametrize(("edit", "message"), SHARDED_REJECTED.values(), ids=SHARDED_REJECTED.keys())
def test_broken_shards_are_rejected_by_name(sharded: Path, allocated: list[object], edit: Edit, message: str) -> None:
    """Checkpoints in several files are checked in the same way."""
    check_rejected(sharded, edit, message, allocated)
