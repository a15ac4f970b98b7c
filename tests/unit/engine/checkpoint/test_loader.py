"""Checkpoints are read exactly; what cannot be served is refused by name."""

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from tools.make_checkpoint import Shape, make_checkpoint, make_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from llama2_server.engine.checkpoint.files import read_config, read_eos_ids
from llama2_server.engine.checkpoint.loader import fetch_checkpoint, load_model
from llama2_server.engine.errors import WeightsError
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.model.weights import LlamaWeights

MakeCheckpoint = Callable[..., Path]
Damage = Callable[[Path], object]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
K_PROJ = "model.layers.0.self_attn.k_proj.weight"


def load(directory: Path, dtype: torch.dtype = torch.float32, context_length: int = 32, **options: Any) -> LlamaModel:
    return load_model(directory, device="cpu", dtype=dtype, context_length=context_length, slots=1, **options)


@pytest.fixture
def copy(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint in one file that a test may change."""
    return Path(shutil.copytree(checkpoint(), tmp_path / "copy"))


@pytest.fixture
def sharded(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint in two files that a test may change."""
    return Path(shutil.copytree(checkpoint(shards=2), tmp_path / "sharded"))


def edit_json(directory: Path, name: str, **changes: Any) -> None:
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(
    directory: Path, change: Callable[[dict[str, Tensor]], object], name: str = "model.safetensors"
) -> None:
    tensors = load_file(directory / name)
    change(tensors)
    save_file(tensors, directory / name, {"format": "pt"})


def config(**changes: Any) -> Damage:
    return lambda directory: edit_json(directory, "config.json", **changes)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    return lambda directory: edit_tensors(directory, change)


def overwrite(name: str, content: bytes) -> Damage:
    return lambda directory: (directory / name).write_bytes(content)


def remove(name: str) -> Damage:
    return lambda directory: (directory / name).unlink()


def cut_short(name: str) -> Damage:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:-1])


def only_pickles(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def reference_logits(directory: Path, dtype: torch.dtype) -> Tensor:
    reference: Any = LlamaForCausalLM.from_pretrained(directory, dtype=dtype)
    with torch.inference_mode():
        return Tensor(reference(torch.tensor([[1, 5, 9]])).logits[0, -1].float())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("served", [torch.float32, torch.float16, torch.bfloat16])
def test_every_stored_dtype_is_served_in_every_dtype(
    checkpoint: MakeCheckpoint, stored: torch.dtype, served: torch.dtype
) -> None:
    """The weights are those of transformers in the same dtype, wherever they lie in the fused matrices."""
    directory = checkpoint(dtype=stored, heads=4, kv_heads=2)
    found = load(directory, served).weights
    expected = LlamaForCausalLM.from_pretrained(directory, dtype=served).state_dict()
    layer = {name.removeprefix("model.layers.1."): tensor for name, tensor in expected.items()}
    qkv = [layer[f"self_attn.{part}_proj.weight"] for part in "qkv"]
    gate_up = [layer[f"mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(found.layers[1].qkv, torch.cat(qkv))
    assert torch.equal(found.layers[1].gate_up, torch.cat(gate_up))
    assert torch.equal(found.head, expected["lm_head.weight"])
    assert found.norm.dtype == served


@pytest.mark.parametrize("block_bytes", [64, 5000])
def test_tensors_larger_than_a_block_are_read_whole(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    """However small the blocks are that a file is read in, the weights are the same."""
    expected = load(checkpoint()).weights
    monkeypatch.setattr("llama2_server.engine.checkpoint.read_buffers.BLOCK_BYTES", block_bytes)
    found = load(checkpoint()).weights
    assert torch.equal(found.embedding, expected.embedding)
    assert torch.equal(found.layers[1].down, expected.layers[1].down)


def test_progress_reaches_the_size_of_the_weights(checkpoint: MakeCheckpoint) -> None:
    """It grows with each tensor, up to all bytes of all shards."""
    calls: list[tuple[int, int]] = []
    load(checkpoint(shards=3), progress=lambda done, total: calls.append((done, total)))
    done = [done for done, _ in calls]
    assert done == sorted(set(done))
    assert done[-1] == sum(tensor.nbytes for tensor in load_file_of_shards(checkpoint(shards=3)).values())
    assert {total for _, total in calls} == {done[-1]}


def load_file_of_shards(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_old_rotary_buffers_are_ignored(copy: Path) -> None:
    """Checkpoints from before transformers 4.31 carry inv_freq, the only tensors that are not needed and welcome."""
    expected = load(copy).prefill(0, [1, 5, 9], 0)
    edit_tensors(copy, lambda t: t.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert torch.equal(load(copy).prefill(0, [1, 5, 9], 0), expected)


def test_rope_theta_and_head_dim_are_read(copy: Path) -> None:
    """A larger rotary base, as in longer-context Llamas, gives transformers' logits."""
    config(rope_theta=500000.0, head_dim=16)(copy)
    torch.testing.assert_close(load(copy).prefill(0, [1, 5, 9], 0), reference_logits(copy, torch.float32))


REFUSED: dict[str, tuple[Damage, str]] = {
    "no config": (remove("config.json"), r"config\.json: no such file"),
    "config is not JSON": (overwrite("config.json", b"{"), r"config\.json: not JSON"),
    "config is not UTF-8": (overwrite("config.json", b"\xff\xfe{"), r"config\.json: not JSON"),
    "config is a list": (overwrite("config.json", b"[]"), r"config\.json: holds a JSON list, expected an object"),
    "another architecture": (
        config(architectures=["MistralForCausalLM"]),
        r"\['Mistral.* expected \['Llama",
    ),
    "no architecture": (config(architectures=None), r"architectures is None"),
    "another model type": (config(model_type="mistral"), r"model_type 'mistral'"),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), r"quantization_config; expected unquantized"),
    "scaled rotary embedding": (config(rope_scaling={"type": "linear", "factor": 2.0}), r"rope_scaling is 'linear'"),
    "attention bias": (config(attention_bias=True), r"attention_bias is True, expected False"),
    "mlp bias": (config(mlp_bias=True), r"mlp_bias is True, expected False"),
    "another activation": (config(hidden_act="gelu"), r"hidden_act is 'gelu', expected 'silu'"),
    "a size that is a text": (config(hidden_size="large"), r"config\.json: .*hidden_size"),
    "no layers": (config(num_hidden_layers=0), r"num_hidden_layers is 0, expected a positive integer"),
    "no heads": (config(num_attention_heads=0), r"config\.json: "),
    "key heads that do not divide": (config(num_key_value_heads=3), r"num_key_value_heads is 1, expected 0"),
    "an odd head": (config(head_dim=15), r"config\.json: .*head_dim.*15"),
    "a short context": (config(max_position_embeddings=16), r"max_position_embeddings is 16, expected at least .* 32"),
    "no tokenizer": (remove("tokenizer.model"), r"tokenizer\.model: no such file"),
    "a broken tokenizer": (overwrite("tokenizer.model", b"rubbish"), r"tokenizer\.model: not a SentencePiece model"),
    "a larger tokenizer": (
        lambda directory: make_tokenizer(directory / "tokenizer.model", 601),
        r"tokenizer\.model: has 601 tokens, expected at most the 600 of the embedding",
    ),
    "no weights": (remove("model.safetensors"), r"has neither model\.safetensors nor model\.safetensors\.index\.json"),
    "only pickles": (only_pickles, r"only pickles \(pytorch_model\.bin\), .* safetensors, or convert"),
    "not safetensors": (overwrite("model.safetensors", b"rubbish"), r"model\.safetensors: not a complete safetensors"),
    "an empty file": (overwrite("model.safetensors", b""), r"model\.safetensors: not a complete safetensors"),
    "a file cut short": (cut_short("model.safetensors"), r"model\.safetensors: not a complete safetensors"),
    "a missing tensor": (
        tensors(lambda t: t.pop(K_PROJ)),
        rf"tensor {K_PROJ} is missing, expected one of shape \(64, 64\)",
    ),
    "an extra tensor": (
        tensors(lambda t: t.update({"model.layers.0.self_attn.k_proj.bias": torch.ones(64)})),
        r"model\.safetensors: tensor model\.layers\.0\.self_attn\.k_proj\.bias is not part of a Llama",
    ),
    "a tensor of another shape": (
        tensors(lambda t: t.update({K_PROJ: torch.ones(32, 64)})),
        rf"model\.safetensors: tensor {K_PROJ} is of shape \(32, 64\), expected \(64, 64\)",
    ),
    "more layers than the config says": (config(num_hidden_layers=1), r"tensor model\.layers\.1\..* is not part of"),
    "fewer layers than the config says": (config(num_hidden_layers=3), r"tensor model\.layers\.2\..* is missing"),
    "tied but with a head": (config(tie_word_embeddings=True), r"tensor lm_head\.weight is not part of"),
    "integers": (
        tensors(lambda t: t.update({K_PROJ: torch.ones(64, 64, dtype=torch.int8)})),
        rf"{K_PROJ} is of dtype I8, expected one of F16, BF16, F32",
    ),
}


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The devices that weights were allocated on."""
    devices: list[object] = []
    allocate = LlamaWeights.allocate

    def spy(config: Any, device: Any, dtype: Any) -> LlamaWeights:
        devices.append(device)
        return allocate(config, device, dtype)

    monkeypatch.setattr(LlamaWeights, "allocate", spy)
    return devices


def check_refused(directory: Path, damage: Damage, message: str, allocated: list[object]) -> None:
    damage(directory)
    with pytest.raises(WeightsError, match=message) as refusal:
        load(directory)
    assert "\n" not in str(refusal.value)
    assert "cpu" not in allocated


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_served_is_refused_by_name(
    copy: Path, allocated: list[object], damage: Damage, message: str
) -> None:
    """One line says which file or tensor, what was found and what was expected, before any memory is taken."""
    check_refused(copy, damage, message, allocated)


SHARDED_REFUSED: dict[str, tuple[Damage, str]] = {
    "a missing shard": (remove(SECOND), rf"{SECOND}: no such file, but model\.safetensors\.index\.json names it"),
    "a shard cut short": (cut_short(FIRST), rf"{FIRST}: not a complete safetensors"),
    "a shard that is another's copy": (
        lambda directory: shutil.copy(directory / FIRST, directory / SECOND),
        rf"{SECOND}: holds .*, which {FIRST} holds already",
    ),
    "an index that is not JSON": (overwrite("model.safetensors.index.json", b"]"), r"index\.json: not JSON"),
    "an index of nothing": (overwrite("model.safetensors.index.json", b"{}"), r"index\.json: has no weight_map"),
    "an index that leaves the directory": (
        overwrite("model.safetensors.index.json", b'{"weight_map": {"a": "../a.safetensors"}}'),
        r"names '\.\./a\.safetensors', expected a file beside it",
    ),
}


@pytest.mark.parametrize(("damage", "message"), SHARDED_REFUSED.values(), ids=SHARDED_REFUSED.keys())
def test_broken_shards_are_refused_by_name(
    sharded: Path, allocated: list[object], damage: Damage, message: str
) -> None:
    """The same for a checkpoint of several files."""
    check_refused(sharded, damage, message, allocated)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 2047, 4095])
def test_values_that_are_not_finite_are_refused(copy: Path, bad: float, place: int) -> None:
    """A single NaN or infinity anywhere in a tensor is refused with the tensor's name."""
    edit_tensors(copy, lambda t: t[K_PROJ].view(-1)[place].fill_(bad))
    with pytest.raises(WeightsError, match=rf"tensor {K_PROJ} holds NaN or infinity"):
        load(copy)


def test_values_too_large_for_float16_are_refused(copy: Path) -> None:
    """They would silently become infinite; in float32 the same checkpoint loads."""
    edit_tensors(copy, lambda t: t[K_PROJ].view(-1)[77].fill_(70000.0))
    with pytest.raises(WeightsError, match=rf"tensor {K_PROJ} holds values that do not fit in torch\.float16"):
        load(copy, torch.float16)
    assert load(copy, torch.float32).dtype == torch.float32


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
    """generation_config.json decides, one id or several; config.json where it says nothing."""
    (copy / "generation_config.json").unlink()
    if generation is not None:
        (copy / "generation_config.json").write_text(json.dumps(generation))
    config(eos_token_id=fallback)(copy)
    assert read_eos_ids(copy) == expected


@pytest.mark.parametrize("eos", [None, [], "two", True])
def test_a_model_that_never_ends_is_refused(copy: Path, eos: Any) -> None:
    """Without an end-of-sequence id no reply would end by itself."""
    (copy / "generation_config.json").unlink()
    config(eos_token_id=eos)(copy)
    with pytest.raises(WeightsError, match=r"eos_token_id is .*, expected token ids"):
        read_eos_ids(copy)


def test_a_broken_generation_config_is_named(copy: Path) -> None:
    """Rubbish in generation_config.json is refused with its path."""
    (copy / "generation_config.json").write_text("rubbish")
    with pytest.raises(WeightsError, match=r"generation_config\.json: not JSON"):
        read_eos_ids(copy)


def test_llama_2_7b_chats_own_config_is_read(tmp_path: Path) -> None:
    """The config.json that Llama-2-7b-chat-hf is published with."""
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


def test_what_cannot_fit_on_the_gpu_is_said_before_anything_is_read(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says how much is needed, for what, and how much is there."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (500_000, 80_000_000_000))
    expected = r"needs 2\.6 GB on cuda \(0\.0 of weights, 2\.6 of KV cache for 40000 x 128 tokens\), and 0\.0 of 80"
    with pytest.raises(WeightsError, match=expected) as refusal:
        load_model(checkpoint(), device="cuda", dtype=torch.float16, context_length=128, slots=40000)
    assert "\n" not in str(refusal.value)


def test_weights_have_a_fingerprint(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The same in every process; another with another seed, or another precision."""

    def found(directory: Path, dtype: torch.dtype) -> str:
        return load(directory, dtype=dtype).weights.fingerprint()

    directory = checkpoint(dtype=torch.float16)
    other = make_checkpoint(tmp_path, Shape(), seed=1)
    first = found(directory, torch.float16)
    assert found(directory, torch.float16) == first
    assert len({first, found(other, torch.float16), found(directory, torch.float32)}) == 3


def test_a_directory_is_its_own_checkpoint(tmp_path: Path) -> None:
    """A directory that exists is used as it is."""
    assert fetch_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("weights", ["/no/such/directory", "./nowhere", "nowhere", "", "a/b/c", "org/na me"])
def test_what_is_neither_directory_nor_hub_id_is_refused(weights: str) -> None:
    """Only org/name is looked up on the Hub."""
    with pytest.raises(WeightsError, match="no such directory, and not an org/name on the Hugging Face Hub either"):
        fetch_checkpoint(weights)


ANSWER: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.GatedRepoError("gated", response=ANSWER), "accept its licence there and set HF_TOKEN"),
        (hub_errors.RepositoryNotFoundError("404", response=ANSWER), "neither a directory here nor a model"),
        (
            hub_errors.HfHubHTTPError("503\nService Unavailable", response=ANSWER),
            r"check the .* \(HfHubHTTPError: 503 Service",
        ),
        (
            hub_errors.LocalEntryNotFoundError("offline"),
            r"check the network and HF_TOKEN, .* \(LocalEntryNotFoundError",
        ),
        (OSError("no space left on device"), r"\(OSError: no space left on device\)"),
    ],
)
def test_what_the_hub_refuses_is_said_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    """One line names the repository and what to do about it."""

    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(WeightsError, match=f"^org/name: .*{message}") as refusal:
        fetch_checkpoint("org/name")
    assert "\n" not in str(refusal.value)
    assert "pass" in str(refusal.value)


def test_only_what_is_needed_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pickles, other frameworks' weights and documents stay on the Hub."""
    calls: list[Any] = []

    def download(repository: str, *, allow_patterns: list[str], **_: Any) -> str:
        calls.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert fetch_checkpoint("org/name") == tmp_path
    ((repository, patterns),) = calls
    assert repository == "org/name"
    offered = ["model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "pytorch_model.bin", "README.md"]
    assert [name for name in offered if any(fnmatch(name, pattern) for pattern in patterns)] == offered[:3]
