"""Tests of the native library: its loading, and torch as the fallback."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.engine.native.models import MakeCheckpoint, library, load, native_decoder, some_ids

from llama2_server.engine.native import library as native


def test_the_model_decodes_natively_and_logs_it(checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture) -> None:
    """One log record names the instruction set; a small model uses one thread; the logits are the native ones."""
    library()
    with caplog.at_level(logging.INFO):
        model = load(checkpoint(dtype=torch.float16), cpu_kernels="auto")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("running natively with ")
    assert message.endswith("threads: 1")
    expected = native_decoder(model).prefill(1, some_ids(20), 0)
    assert torch.equal(model.prefill(0, some_ids(20), 0), expected)
    expected = native_decoder(model).decode([0], [5], [20])
    assert torch.equal(model.decode([0], [5], [20]), expected)


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """Load the library again in this test and after it."""
    native.load_library.cache_clear()
    yield
    native.load_library.cache_clear()


def missing(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(native, "LIBRARY", folder / "decode.so")


def damaged(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "decode.so").write_bytes(b"rubbish")
    patch.setattr(native, "LIBRARY", folder / "decode.so")


def outdated(patch: pytest.MonkeyPatch, folder: Path) -> None:
    library()
    native.load_library.cache_clear()
    patch.setattr(native, "INTERFACE_VERSION", -1)


def another_processor(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(library(), "llama2_instructions", lambda name: None)


@pytest.mark.parametrize(
    ("break_library", "options", "reason"),
    [
        (missing, {}, "the native library was not built; install a C++ compiler and reinstall llama2-grpc"),
        (damaged, {}, "the native library cannot be loaded"),
        (outdated, {}, "the native library was built from another version; reinstall llama2-grpc"),
        (another_processor, {}, "this processor does not support AVX2 with F16C"),
        (None, {"cpu_kernels": "torch"}, "--cpu-kernels is torch"),
        (None, {"dtype": torch.bfloat16}, "support only torch.float16"),
    ],
)
@pytest.mark.usefixtures("fresh_library")
def test_torch_replaces_a_missing_native_library_and_one_log_record_gives_the_reason(
    checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    break_library: Callable[[pytest.MonkeyPatch, Path], None] | None,
    options: dict[str, Any],
    reason: str,
) -> None:
    """Without compiler, library or instructions the model loads and decodes, and one log record gives the fix."""
    if break_library:
        break_library(monkeypatch, tmp_path)
    model = load(checkpoint(dtype=torch.float16), **({"cpu_kernels": "auto"} | options))
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("running in torch, which is slower: ")
    assert reason in message
    assert "\n" not in message
    model.prefill(0, some_ids(20), 0)
    assert model.decode([0], [5], [20]).shape == (1, 600)


def test_the_read_bandwidth_is_measured() -> None:
    """The bandwidth in bytes per second, to which decoding is compared, is positive."""
    library()
    assert native.read_bandwidth(torch.zeros(2**22), threads=2) > 0
