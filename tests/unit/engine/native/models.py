"""Models and native decoders for the tests of the native forward pass."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.model.native_decoder import NativeDecoder
from llama2_server.engine.model.packed_weights import PackedMatrix, allocate_packed
from llama2_server.engine.model.weight_layout import AMX, TileLayout
from llama2_server.engine.model.weights import LlamaConfig, LlamaWeights
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


def supported(name: str) -> str:
    """Return the name of an instruction set, or skip the test if this processor does not support it."""
    if library().llama2_instructions(name.encode()) is None:
        pytest.skip(f"NOT TESTED: this processor does not support {name}")
    return name


def load(directory: Path, dtype: torch.dtype = torch.float16, **options: Any) -> LlamaModel:
    """Load a model that decodes in torch by default."""
    options = {"cpu_kernels": "torch"} | options
    return load_model(directory, device="cpu", dtype=dtype, context_length=CONTEXT, slots=SLOTS, **options)


def native_decoder(model: LlamaModel, instructions: str = "", threads: int = 2) -> NativeDecoder:
    """Return a decoder over the model's weights and KV cache, or skip the test. AMX gets the weights in tiles."""
    library()
    weights: LlamaWeights[Any] = model.weights
    if instructions == AMX and not isinstance(weights.head, PackedMatrix):
        weights = in_tiles(model.config, weights)
    return NativeDecoder(
        model.config, weights, model.kv_cache, model.rotary, threads=threads, instructions=instructions
    )


def in_tiles(config: LlamaConfig, weights: LlamaWeights[Tensor]) -> LlamaWeights[PackedMatrix]:
    """Return a copy of the weights in tiles, or skip the test if AMX does not support their sizes."""
    skip_unless_amx_fits(config)
    packed = allocate_packed(config, TileLayout())
    for matrix, tensor in zip(packed.matrices, weights.matrices, strict=True):
        assert matrix.pack(0, tensor)
    packed.norm.copy_(weights.norm)
    for to, layer in zip(packed.layers, weights.layers, strict=True):
        to.attention_norm.copy_(layer.attention_norm)
        to.mlp_norm.copy_(layer.mlp_norm)
    return packed


def skip_unless_amx_fits(config: LlamaConfig) -> None:
    """Skip the test if the AMX kernels do not run a model of these sizes."""
    if any(size % 16 for size in (config.query_size, config.kv_size, config.intermediate_size)):
        pytest.skip("AMX needs sizes that are multiples of 16; other models have the portable kernels")


def some_ids(count: int, seed: int = 0) -> list[int]:
    """Return random token ids, the same for the same seed."""
    return random.Random(seed).choices(range(3, 600), k=count)


def prefill_all(model: LlamaModel, lengths: list[int]) -> None:
    """Prefill a different prompt in each slot."""
    for slot, length in enumerate(lengths):
        model.prefill(slot, some_ids(length, seed=slot), 0)
