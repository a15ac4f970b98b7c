"""Checkpoints with random weights and a tokenizer, created once for all engine tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support.checkpoints import MakeCheckpoint, cached_make_checkpoint
from tools.make_checkpoint import make_tokenizer

from llama2_server.engine.native import library as native
from llama2_server.engine.text.tokenizer import Tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Use one thread, because a second one does not speed up tiny tensors and may wait long for a busy core."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Return the function that makes checkpoints."""
    return cached_make_checkpoint(tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small byte-fallback tokenizer with Llama-2's settings."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    make_tokenizer(path, 600)
    return Tokenizer(path)


@pytest.fixture(scope="session", autouse=True)
def _cpu_kernels_from_environment() -> Iterator[None]:
    """If LLAMA2_CPU_KERNELS is torch, run all engine tests without the native library."""
    if os.environ.get("LLAMA2_CPU_KERNELS") != "torch":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LIBRARY", Path("not-built.so"))
        native.load_library.cache_clear()
        yield
    native.load_library.cache_clear()
