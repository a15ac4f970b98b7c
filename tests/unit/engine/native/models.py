"""Models and native decoders for the tests of the native forward pass."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.model.native_decoder import NativeDecoder
from llama2_server.engine.native import library as native
from llama2_server.engine.native.library import NativeUnavailable

CONTEXT = 128
SLOTS = 17
MakeCheckpoint = Callable[..., Path]


def library() -> Any:
    """Return the native library, or skip the test."""
    try:
        return native.load_library()
    except NativeUnavailable as reason:
        return pytest.skip(f"NOT TESTED: {reason}")


def load(directory: Path, dtype: torch.dtype = torch.float16, **options: Any) -> LlamaModel:
    """Load a model that decodes in torch by default."""
    options = {"cpu_kernels": "torch"} | options
    return load_model(directory, device="cpu", dtype=dtype, context_length=CONTEXT, slots=SLOTS, **options)


def native_decoder(model: LlamaModel, instructions: str = "", threads: int = 2) -> NativeDecoder:
    """Return a decoder over the model's weights and KV cache, or skip the test."""
    library()
    return NativeDecoder(
        model.config, model.weights, model.kv_cache, model.rotary, threads=threads, instructions=instructions
    )


def some_ids(count: int, seed: int = 0) -> list[int]:
    """Return random token ids, the same for the same seed."""
    return random.Random(seed).choices(range(3, 600), k=count)


def prefill_all(model: LlamaModel, lengths: list[int]) -> None:
    """Prefill a different prompt in each slot."""
    for slot, length in enumerate(lengths):
        model.prefill(slot, some_ids(length, seed=slot), 0)
