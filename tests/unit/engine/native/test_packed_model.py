"""A model with packed weights computes the same bits as with float16 weights."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.checkpoints import edit_tensors
from tests.unit.engine.native.models import (
    MakeCheckpoint,
    library,
    load,
    native_decoder,
    skip_unless_amx_fits,
    some_ids,
)
from torch import Tensor

from llama2_server.engine.checkpoint import loader
from llama2_server.engine.checkpoint.loader import measure_checkpoint
from llama2_server.engine.errors import EngineError, WeightsError
from llama2_server.engine.model import cpu_kernels
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.model.packed_weights import PackedMatrix, packs_weights
from llama2_server.engine.model.weight_layout import AMX

SHAPES: dict[str, dict[str, Any]] = {
    "whole blocks": {"hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 640},
    "parts of blocks, tied": {"hidden": 300, "heads": 6, "kv_heads": 3, "ffn": 700, "vocab": 603, "tied": True},
    "parts of tiles, tied": {"hidden": 336, "heads": 7, "kv_heads": 1, "ffn": 720, "vocab": 603, "tied": True},
    "rows shorter than a block": {"hidden": 64, "heads": 4, "kv_heads": 4, "ffn": 176},
}
LARGE = 64 * 1024 * 1024


@pytest.fixture(autouse=True)
def _library() -> None:
    library()


def mix_formats(tensors: dict[str, Tensor]) -> None:
    """Round most rows to bfloat16; leave some as they are, and give others large and small numbers."""
    for tensor in tensors.values():
        if tensor.ndim == 2:
            exact = tensor.clone()
            tensor.copy_(tensor.bfloat16().half())
            tensor[::7] = exact[::7]
            tensor[5::11, 3] = 1.25
            tensor[6::11, 9] = 2.0**-24
            tensor[9::13, 11] = -0.0
            tensor[10:30] = exact[10:30]  # a run of float16 rows


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def mixed(request: pytest.FixtureRequest, checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint with rows of all formats."""
    directory = Path(shutil.copytree(checkpoint(dtype=torch.float16, **request.param), tmp_path / "mixed"))
    edit_tensors(directory, mix_formats)
    return directory


def load_both(directory: Path, instructions: str = "") -> list[LlamaModel]:
    kernels = "amx" if instructions == AMX else "portable"
    models = [load(directory, cpu_kernels=kernels, cpu_weight_bits=bits) for bits in ("12", "16")]
    if instructions == AMX:
        skip_unless_amx_fits(models[0].config)
    assert [model.kernels for model in models] == [kernels] * 2
    return models


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_have_the_same_bits(mixed: Path, instructions: str, threads: int) -> None:
    """This holds for a prompt of several chunks, and for decode steps of 1 to 16 rows."""
    models = load_both(mixed, instructions)
    packed, plain = (native_decoder(model, instructions, threads) for model in models)
    assert torch.equal(packed.prefill(0, some_ids(100), 0), plain.prefill(0, some_ids(100), 0))
    for rows in (1, 2, 3, 5, 7, 16):
        step = (list(range(rows)), some_ids(rows, seed=rows), [0] * rows)
        assert torch.equal(packed.decode(*step), plain.decode(*step))
    assert torch.equal(packed.decode([0], [5], [100]), plain.decode([0], [5], [100]))
    for one, other in zip(models[0].kv_cache.keys, models[1].kv_cache.keys, strict=True):
        assert torch.equal(one[:16, :, :1], other[:16, :, :1])


def test_the_quick_digest_does_not_depend_on_the_format(mixed: Path, instructions: str) -> None:
    """Replies are the same, so cached responses stay valid; a digest is the one of the tensors also in tiles."""
    packed, plain = load_both(mixed, instructions)
    assert packed.weights.quick_digest() == plain.weights.quick_digest()
    assert packed.weights.quick_digest() == load(mixed).weights.quick_digest()
    assert packed.weights.parameters == plain.weights.parameters


def from_bfloat16(directory: Path, target: Path) -> Path:
    copy = Path(shutil.copytree(directory, target))
    edit_tensors(copy, lambda t: t.update({name: tensor.bfloat16().half() for name, tensor in t.items()}))
    return copy


def test_memory_falls_by_a_quarter_and_the_share_is_logged(
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    instructions: str,
) -> None:
    """Weights from bfloat16 take 12 bits; only norms and the tables of rows are extra. `weights check` agrees."""
    shape = {"hidden": 512, "heads": 4, "kv_heads": 4, "ffn": 1408}
    directory = from_bfloat16(checkpoint(dtype=torch.float16, **shape), tmp_path / "copy")
    with caplog.at_level(logging.INFO):
        packed, plain = load_both(directory, instructions)
    assert 0.75 <= packed.weights.size_bytes / plain.weights.size_bytes < 0.765
    assert packed.memory_bytes == packed.weights.size_bytes + packed.kv_cache.nbytes
    (message,) = [text for record in caplog.records if (text := record.getMessage()).startswith("weights: ")]
    assert message.startswith("weights: 100.00% are stored in 12 bits without loss, ")
    measure_like(instructions, monkeypatch)
    kernels, share = measure_checkpoint(directory)
    assert kernels == packed.kernels
    assert (share.packed, share.total) == (packed.weights.parameters - 5 * 512, share.packed)


def measure_like(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the default of small models be the family of these instructions."""
    monkeypatch.setattr(cpu_kernels, "MIN_PACKED_BYTES", 0 if instructions == AMX else LARGE)


def test_the_measured_share_equals_the_loaded_share(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, instructions: str
) -> None:
    """Also for tied embeddings, which count once, and for rows of all formats."""
    loaded = [matrix.share for matrix in load_both(mixed, instructions)[0].weights.matrices]
    measure_like(instructions, monkeypatch)
    measured = measure_checkpoint(mixed).share
    assert measured.packed == sum(share.packed for share in loaded)
    assert measured.total == sum(share.total for share in loaded)
    assert measured.size_bytes == sum(share.size_bytes for share in loaded)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_other_stored_dtypes_are_packed_after_the_conversion(checkpoint: MakeCheckpoint, stored: torch.dtype) -> None:
    """The bits are those of the float16 model."""
    packed, plain = load_both(checkpoint(dtype=stored, hidden=256))
    assert torch.equal(packed.prefill(0, some_ids(20), 0), plain.prefill(0, some_ids(20), 0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_rejected(checkpoint: MakeCheckpoint, tmp_path: Path, bad: float) -> None:
    """Loading and checking name the tensor."""
    directory = Path(shutil.copytree(checkpoint(dtype=torch.float16, hidden=256), tmp_path / "bad"))
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(directory, lambda t: t[name].view(-1)[-1].fill_(bad))
    with pytest.raises(WeightsError, match=rf"tensor {name} contains NaN or infinity"):
        load(directory, cpu_kernels="auto", cpu_weight_bits="12")
    with pytest.raises(WeightsError, match=rf"tensor {name} contains numbers that float16 cannot represent"):
        measure_checkpoint(directory)


def test_a_file_that_ends_inside_a_tensor_is_rejected(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file passes the check of its header and shrinks before it is read."""
    directory = Path(shutil.copytree(checkpoint(dtype=torch.float16, hidden=256), tmp_path / "short"))
    path = directory / "model.safetensors"
    read_tensors = loader._read_tensors

    def shrink_and_read(*arguments: Any) -> None:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        read_tensors(*arguments)

    monkeypatch.setattr(loader, "_read_tensors", shrink_and_read)
    with pytest.raises(WeightsError, match="the file ends inside tensor"):
        load(directory, cpu_kernels="auto", cpu_weight_bits="12")


def test_torch_and_small_models_keep_16_bits(checkpoint: MakeCheckpoint) -> None:
    """Only the native kernels read packed weights."""
    directory = checkpoint(dtype=torch.float16, hidden=256)
    choices: list[dict[str, Any]] = [{"cpu_kernels": "torch", "cpu_weight_bits": "12"}, {"cpu_kernels": "auto"}]
    for options in choices:
        assert isinstance(load(directory, **options).weights.head, Tensor)
    assert isinstance(load(directory, torch.float32, cpu_weight_bits="12").weights.head, Tensor)
    assert isinstance(load(directory, cpu_kernels="auto", cpu_weight_bits="12").weights.head, PackedMatrix)


def test_packed_weights_need_the_native_kernels(checkpoint: MakeCheckpoint) -> None:
    """No other code reads them."""
    model = load(checkpoint(dtype=torch.float16, hidden=256), cpu_kernels="auto", cpu_weight_bits="12")
    with pytest.raises(EngineError, match="packed weights need the native kernels: --cpu-kernels is torch"):
        LlamaModel(model.config, model.weights, context_length=16, slots=1, cpu_kernels="torch")


@pytest.mark.parametrize(("instructions", "bits"), [(b"AVX-512", "12"), (b"AVX2", "16"), (b"NEON", "16"), (None, "16")])
def test_the_instruction_set_determines_the_default(
    monkeypatch: pytest.MonkeyPatch, instructions: bytes | None, bits: str
) -> None:
    """Measurements in benchmarks/README.md; where nothing was measured, weights stay at 16 bits."""
    monkeypatch.setattr(library(), "llama2_instructions", lambda name: instructions)
    assert packs_weights("auto", LARGE, 1) == (bits == "12")
    assert packs_weights("12", LARGE, 8) == (instructions is not None)
    assert not packs_weights("16", LARGE, 1)
    assert not packs_weights("auto", LARGE // 4, 1)
    assert not packs_weights("auto", LARGE, 2)


def test_weights_that_do_not_fit_in_the_free_memory_are_rejected(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for 12 bits per weight is not enough if few weights fit; loading ends before memory runs out."""
    directory = checkpoint(dtype=torch.float16, hidden=256)
    model = load(directory, cpu_kernels="auto", cpu_weight_bits="16")
    free_bytes = model.kv_cache.nbytes + model.weights.size_bytes * 9 // 10
    monkeypatch.setattr("llama2_server.engine.checkpoint.loader.available_bytes", lambda: free_bytes)
    with pytest.raises(WeightsError, match=r"because too few of them fit in 12 bits .*; free memory, or lower"):
        load(directory, cpu_kernels="auto", cpu_weight_bits="12")
    with pytest.raises(WeightsError, match="GB are free; free memory, or lower"):
        load(directory, cpu_kernels="auto", cpu_weight_bits="16")
