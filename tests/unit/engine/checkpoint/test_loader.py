"""Checkpoints are read exactly, and values and sizes that do not fit are rejected."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.support.checkpoints import Edit, MakeCheckpoint, config, edit_tensors, tensors
from tests.unit.engine.checkpoint.loading import load
from tools.make_checkpoint import Shape, make_checkpoint
from torch import Tensor
from transformers import LlamaForCausalLM

from llama2_server.engine.checkpoint import loader
from llama2_server.engine.checkpoint.loader import EMBEDDING, HEAD, load_model
from llama2_server.engine.checkpoint.read_buffers import BUFFER_BYTES
from llama2_server.engine.errors import WeightsError

K_PROJ = "model.layers.0.self_attn.k_proj.weight"


def reference_logits(directory: Path, dtype: torch.dtype) -> Tensor:
    reference: Any = LlamaForCausalLM.from_pretrained(directory, dtype=dtype)
    with torch.inference_mode():
        return Tensor(reference(torch.tensor([[1, 5, 9]])).logits[0, -1].float())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("served", [torch.float32, torch.float16, torch.bfloat16])
def test_every_stored_dtype_is_served_in_every_dtype(
    checkpoint: MakeCheckpoint, stored: torch.dtype, served: torch.dtype
) -> None:
    """The weights equal transformers' weights in the same dtype, in each part of the fused matrices."""
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


@pytest.mark.parametrize("buffer_bytes", [64, 5000])
def test_tensors_larger_than_a_buffer_are_read_completely(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, buffer_bytes: int
) -> None:
    """The weights do not depend on the size of the read buffers."""
    expected = load(checkpoint()).weights
    monkeypatch.setattr("llama2_server.engine.checkpoint.read_buffers.BUFFER_BYTES", buffer_bytes)
    found = load(checkpoint()).weights
    assert torch.equal(found.embedding, expected.embedding)
    assert torch.equal(found.layers[1].down, expected.layers[1].down)


def test_progress_reaches_the_size_of_the_weights(checkpoint: MakeCheckpoint) -> None:
    """Progress grows with each tensor, up to the size of all shards."""
    calls: list[tuple[int, int]] = []
    load(checkpoint(shards=3), progress=lambda done, total: calls.append((done, total)))
    done = [done for done, _ in calls]
    assert done == sorted(set(done))
    assert done[-1] == sum(tensor.nbytes for tensor in load_shards(checkpoint(shards=3)).values())
    assert {total for _, total in calls} == {done[-1]}


def load_shards(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


ROTARY_BUFFERS = {
    "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8),
    "model.layers.0.self_attn.rotary_emb.cos_cached": torch.zeros(1, 1, 128, 16),
    "model.layers.0.self_attn.rotary_emb.sin_cached": torch.zeros(1, 1, 128, 16, dtype=torch.float64),
    "model.rotary_emb.inv_freq": torch.ones(8),
    "model.rotary_emb.original_inv_freq": torch.ones(8),
    "model.layers.1.rotary_emb.max_seq_len_cached": torch.tensor(128),
    "rotary_emb.inv_freq": torch.ones(8),
}


@pytest.mark.parametrize("name", ROTARY_BUFFERS)
def test_rotary_buffers_are_ignored(copy: Path, name: str) -> None:
    """Buffers that follow from the configuration have no effect, under any name and in any dtype."""
    expected = load(copy).prefill(0, [1, 5, 9], 0)
    edit_tensors(copy, lambda t: t.update({name: ROTARY_BUFFERS[name]}))
    assert torch.equal(load(copy).prefill(0, [1, 5, 9], 0), expected)


def store_head(dtype: torch.dtype) -> Edit:
    return tensors(lambda t: t.update({HEAD: t[EMBEDDING].to(dtype, copy=True)}))


TIED: dict[str, Edit] = {
    "no head": lambda directory: None,
    "an equal head": store_head(torch.float16),
    "an equal head in another dtype": store_head(torch.float32),
    "only a head": tensors(lambda t: t.update({HEAD: t.pop(EMBEDDING)})),
}


@pytest.mark.parametrize("edit", TIED.values(), ids=TIED.keys())
@pytest.mark.parametrize("buffer_bytes", [64, 5000, BUFFER_BYTES])
def test_a_tied_head_may_be_stored(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Edit, buffer_bytes: int
) -> None:
    """With tied embeddings, the logits follow from the embedding, whether or not the head is stored too."""
    directory = Path(shutil.copytree(checkpoint(tied=True, dtype=torch.float16), tmp_path / "tied"))
    expected = reference_logits(directory, torch.float32)
    edit(directory)
    monkeypatch.setattr("llama2_server.engine.checkpoint.read_buffers.BUFFER_BYTES", buffer_bytes)
    torch.testing.assert_close(load(directory).prefill(0, [1, 5, 9], 0), expected)


@pytest.mark.parametrize("index", [0, -1])
def test_a_different_tied_head_is_rejected(checkpoint: MakeCheckpoint, tmp_path: Path, index: int) -> None:
    """One different number is enough, and the error names both tensors and the configuration."""
    directory = Path(shutil.copytree(checkpoint(tied=True), tmp_path / "tied"))
    store_head(torch.float32)(directory)
    edit_tensors(directory, lambda t: t[HEAD].view(-1)[index].add_(1))
    with pytest.raises(
        WeightsError,
        match=rf"tensor {HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true in config\.json; ",
    ):
        load(directory)


def test_rope_theta_and_head_dim_are_read(copy: Path) -> None:
    """With a larger rotary base, as in Llamas with a longer context, the logits equal transformers' logits."""
    config(rope_theta=500000.0, head_dim=16)(copy)
    torch.testing.assert_close(load(copy).prefill(0, [1, 5, 9], 0), reference_logits(copy, torch.float32))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("index", [0, 2047, 4095])
def test_values_that_are_not_finite_are_rejected(copy: Path, bad: float, index: int) -> None:
    """The error for a single NaN or infinity in a tensor names the tensor."""
    edit_tensors(copy, lambda t: t[K_PROJ].view(-1)[index].fill_(bad))
    with pytest.raises(WeightsError, match=rf"tensor {K_PROJ} contains NaN or infinity"):
        load(copy)


def test_values_too_large_for_float16_are_rejected(copy: Path) -> None:
    """They would become infinite in float16; the same checkpoint loads in float32."""
    edit_tensors(copy, lambda t: t[K_PROJ].view(-1)[77].fill_(70000.0))
    with pytest.raises(
        WeightsError, match=rf"tensor {K_PROJ} contains values that do not fit in torch\.float16; set --dtype"
    ):
        load(copy, torch.float16)
    assert load(copy, torch.float32).dtype == torch.float32


def test_a_model_too_large_for_the_gpu_is_rejected_before_it_is_read(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line reports the needed memory, its parts and the free memory."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (500_000, 80_000_000_000))
    expected = (
        r"needs 3\.2 GB on cuda \(0\.0 GB of weights, 2\.6 GB of KV cache for 40000 x 128 tokens, "
        r"0\.6 GB to compute with\), "
        r"but only 0\.0 of 80\.0 GB are free; free memory, or lower context_length_limit or max_concurrent_requests"
    )
    with pytest.raises(WeightsError, match=expected) as rejection:
        load_model(checkpoint(), device="cuda", dtype=torch.float16, context_length=128, slots=40000)
    assert "\n" not in str(rejection.value)


def test_a_model_too_large_for_the_memory_is_rejected_before_it_is_read(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is the memory that is available to this process."""
    monkeypatch.setattr(loader, "available_bytes", lambda: 500_000)
    monkeypatch.setattr(loader, "_allocate", None)
    with pytest.raises(WeightsError, match=r"needs 2\.6 GB on cpu .* but only 0\.0 GB are free; free memory, or lower"):
        load_model(checkpoint(), device="cpu", dtype=torch.float16, context_length=128, slots=40000)


def test_weights_have_a_quick_digest(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The digest is reproducible; another seed or another precision changes it."""

    def found(directory: Path, dtype: torch.dtype) -> str:
        return load(directory, dtype=dtype).weights.quick_digest()

    directory = checkpoint(dtype=torch.float16)
    other = make_checkpoint(tmp_path, Shape(), seed=1)
    first = found(directory, torch.float16)
    assert found(directory, torch.float16) == first
    assert len({first, found(other, torch.float16), found(directory, torch.float32)}) == 3
