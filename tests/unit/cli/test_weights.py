"""`llama2-server weights check`: the share of weights that fit in 12 bits."""

from pathlib import Path

import pytest
import torch
from tests.support.checkpoints import edit_tensors
from tests.unit.cli.runner import error, output
from tools.make_checkpoint import Shape, make_checkpoint

from llama2_server.engine.native.library import NativeUnavailable, load_library


@pytest.fixture(autouse=True)
def _library() -> None:
    try:
        load_library()
    except NativeUnavailable as reason:
        pytest.skip(f"NOT TESTED: {reason}")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint in float16 that was trained in bfloat16, with weights below 0.25 as most of Llama-2's."""
    made = make_checkpoint(tmp_path, Shape(hidden=128, ffn=256), trained_dtype=torch.bfloat16)
    edit_tensors(made, lambda t: t.update({name: (tensor.float() / 8).bfloat16().half() for name, tensor in t.items()}))
    return made


def test_check_prints_the_share(directory: Path) -> None:
    """One number with more than 8 significant bits keeps its row of 128 weights at 16 bits."""
    assert output("weights", "check", str(directory)).startswith(
        f"{directory}: 100.00% of the weights fit in 12 bits without loss: 0.00 GB in memory instead of 0.00 GB, "
        "with the portable kernels"
    )
    edit_tensors(directory, lambda t: t["model.layers.0.mlp.up_proj.weight"].view(-1)[300].fill_(0.1))
    total = 2 * 600 * 128 + 2 * (4 * 128 * 128 + 3 * 256 * 128)
    share = f"{100 * (total - 128) / total:.2f}%"
    assert output("weights", "check", str(directory)).startswith(f"{directory}: {share} of the weights fit in 12 bits")


def test_check_rejects_what_is_no_checkpoint(tmp_path: Path) -> None:
    """The error is the one of `serve`."""
    assert error("weights", "check", str(tmp_path)).startswith(f"{tmp_path / 'config.json'}: no such file; ")


def test_check_without_the_native_library(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library computes the formats, so its absence is an error with the remedy."""
    monkeypatch.setattr(load_library(), "llama2_instructions", lambda name: None)
    assert error("weights", "check", str(directory)) == (
        "cannot measure weights: this processor does not support AVX2 with F16C"
    )
