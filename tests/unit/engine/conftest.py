"""Checkpoints with random weights, made once for all engine tests."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from tools.make_checkpoint import Shape, make_checkpoint, make_tokenizer

from llama2_server.engine.native import library as native
from llama2_server.engine.text.tokenizer import Tokenizer

# Without a GPU, Triton's interpreter runs the kernels. Triton reads the variable when it is imported, which the tests
# of the checkpoint loader already do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


class MakeCheckpoint(Protocol):
    """Makes a checkpoint with these fields of Shape, one directory for each; it must not be written to."""

    def __call__(self, *, shards: int = 1, dtype: torch.dtype = torch.float32, **shape: Any) -> Path: ...


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from a second thread, and wait for it long where the cores are busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """How a test asks for a checkpoint."""
    made: dict[str, Path] = {}

    def make(*, shards: int = 1, dtype: torch.dtype = torch.float32, **shape: Any) -> Path:
        key = f"{shape}-{shards}-{dtype}"
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("made"), Shape(**shape), shards=shards, dtype=dtype)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small byte-fallback tokenizer with Llama-2's settings."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    make_tokenizer(path, 600)
    return Tokenizer(path)


@pytest.fixture(scope="session", autouse=True)
def _kernels_of_the_environment() -> Iterator[None]:
    """With LLAMA2_CPU_KERNELS=torch all engine tests run as where the native step was never built."""
    if os.environ.get("LLAMA2_CPU_KERNELS") != "torch":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LIBRARY", Path("not-built.so"))
        native.load_library.cache_clear()
        yield
    native.load_library.cache_clear()
