"""Check the tensors of a checkpoint and read them directly into the weights of a model on its device."""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llama2_server.engine.checkpoint.digests import verify_digests
from llama2_server.engine.checkpoint.files import TensorEntry, read_config, read_tensor_table
from llama2_server.engine.checkpoint.formats import check_format
from llama2_server.engine.checkpoint.layout import check_context
from llama2_server.engine.checkpoint.read_buffers import ReadBuffers, equal_in_file, reader_threads
from llama2_server.engine.checkpoint.tokenizer_files import open_tokenizer
from llama2_server.engine.errors import WeightsError
from llama2_server.engine.memory import (
    CUDA_RESERVE_BYTES,
    LOWER_MEMORY_USE,
    MemoryNeed,
    available_bytes,
    check_memory,
)
from llama2_server.engine.model.cpu_kernels import CpuKernels, choose_layout, runs_amx
from llama2_server.engine.model.kv_cache import KVCache
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.model.packed_weights import (
    CpuWeightBits,
    PackedMatrix,
    PackedMemoryFull,
    PackedShare,
    allocate_packed,
)
from llama2_server.engine.model.weight_layout import ROWS, TileLayout, WeightLayout
from llama2_server.engine.model.weights import LayerWeights, LlamaConfig, LlamaWeights
from llama2_server.engine.native.library import NativeUnavailable, find_instructions
from llama2_server.engine.text.tokenizer import Tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MATCHING_FILES = "use the config.json and the weights of the same checkpoint"

logger = logging.getLogger(__name__)

Weights = LlamaWeights[Tensor] | LlamaWeights[PackedMatrix]
Destination = Tensor | PackedMatrix
Progress = Callable[[int, int], None]  # called with the loaded and the total number of bytes


def load_model(
    directory: Path,
    *,
    device: str,
    dtype: torch.dtype,
    context_length: int,
    slots: int,
    config: LlamaConfig | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
    cpu_kernels: CpuKernels = "auto",
    cpu_weight_bits: CpuWeightBits = "auto",
    threads: int | None = None,
) -> LlamaModel:
    """Load a checkpoint as a model with `slots` slots of `context_length` tokens each.

    Args:
        directory: the checkpoint.
        device: a torch device, such as "cpu" or "cuda".
        dtype: the precision of the loaded weights.
        context_length: maximum number of tokens per sequence.
        slots: maximum number of concurrent sequences.
        config: the result of `read_config`, if known.
        tokenizer: the result of `open_tokenizer`, if known.
        progress: called after each tensor.
        cpu_kernels: the native kernels on a CPU, or torch; see `model/cpu_kernels.py`.
        cpu_weight_bits: bits per weight that the native kernels read; 12 only where this is exact.
        threads: number of CPU threads; None selects it.

    Raises:
        WeightsError: it is incomplete, not a Llama, not finite in `dtype`, or too large; the headers are checked first.
    """
    config = config or read_config(directory)
    check_context(directory, config.max_positions, context_length)
    _check_tokenizer(directory, config, tokenizer or open_tokenizer(directory))
    meta_weights = LlamaWeights.allocate(config, "meta", dtype)
    stored = read_checked_table(directory, config, meta_weights)
    cache_bytes = KVCache.size_bytes(config, slots, context_length, dtype)
    kernels = cpu_kernels if (torch.device(device).type, dtype) == ("cpu", torch.float16) else "torch"
    layout = choose_layout(kernels, cpu_weight_bits, config, meta_weights.size_bytes, slots)
    least_bytes = _least_bytes(layout, meta_weights.size_bytes)
    _check_memory(directory, device, MemoryNeed(least_bytes, cache_bytes, f"{slots} x {context_length} tokens"))
    try:
        weights = _allocate(config, device, dtype, layout, cache_bytes)
        _read_tensors(stored, tensor_destinations(config, weights), progress or _no_progress)
        _log_packed_share(weights)
        shape = {"context_length": context_length, "slots": slots}
        return LlamaModel(config, weights, cpu_kernels=cpu_kernels, threads=threads, **shape)
    except (PackedMemoryFull, torch.OutOfMemoryError) as error:
        raise WeightsError(f"{directory}: {_memory_problem(device, error)}; {LOWER_MEMORY_USE}") from error


def read_checked_table(directory: Path, config: LlamaConfig, weights: LlamaWeights[Tensor]) -> dict[str, TensorEntry]:
    """Return the tensors of a checkpoint that belong to these weights, by name; a tied head is not one of them.

    Raises:
        WeightsError: a tensor is missing, superfluous or has another shape, or a file is not the published one.
    """
    stored = read_tensor_table(directory)
    verify_digests(directory, {tensor.path for tensor in stored.values()})
    if config.tied_embeddings:
        stored = _merge_tied_head(stored)
    _check_tensors(directory, stored, tensor_destinations(config, weights))
    return stored


def _no_progress(done_bytes: int, total_bytes: int) -> None:
    pass


def _log_packed_share(weights: Weights) -> None:
    packed = [matrix for matrix in weights.matrices if isinstance(matrix, PackedMatrix)]
    shares = [matrix.share for matrix in packed if matrix.layout.twelve_bits]
    if shares:
        share = sum(shares, PackedShare())
        logger.info("weights: %s are stored in 12 bits without loss, %.2f GB", share, share.size_bytes / 1e9)


def _memory_problem(device: str, error: Exception) -> str:
    if isinstance(error, PackedMemoryFull):
        return str(error)
    return f"weights and KV cache do not fit on {device}: {error}"


def _least_bytes(layout: WeightLayout | None, size_bytes: int) -> int:
    """Return the least memory that weights can need, if as many as possible are stored in 12 bits instead of 16."""
    return size_bytes * 3 // 4 if layout is not None and layout.twelve_bits else size_bytes


def _allocate(
    config: LlamaConfig, device: str, dtype: torch.dtype, layout: WeightLayout | None, cache_bytes: int
) -> Weights:
    """Return weights; packed ones may take the memory which the KV cache leaves on a CPU, if it is known."""
    if layout is None:
        return LlamaWeights.allocate(config, device, dtype)
    free_bytes = available_bytes()
    return allocate_packed(config, layout, None if free_bytes is None else free_bytes - cache_bytes)


def _check_memory(directory: Path, device: str, need: MemoryNeed) -> None:
    """Raise WeightsError before any tensor is read, if the free memory of the device is too small."""
    if torch.device(device).type == "cuda":
        need = need._replace(reserve_bytes=CUDA_RESERVE_BYTES)
        check_memory(directory, device, need, *torch.cuda.mem_get_info(device))
    else:
        check_memory(directory, device, need, available_bytes())


def _check_tokenizer(directory: Path, config: LlamaConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise WeightsError(
            f"{directory / tokenizer.file_name}: has {tokenizer.vocab_size} tokens, expected at most "
            f"{config.vocab_size}, the rows of the embedding; copy it from the same checkpoint"
        )


def _merge_tied_head(stored: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return the tensors with one entry for the embedding and the tied head, whichever of the two is stored."""
    others = {name: tensor for name, tensor in stored.items() if name not in (EMBEDDING, HEAD)}
    embedding, head = stored.get(EMBEDDING), stored.get(HEAD)
    if embedding is not None and head is not None and not equal_in_file(embedding, head):
        raise WeightsError(
            f"{head.path}: tensor {HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true in config.json; "
            "set it to false, or remove the tensor that training did not use"
        )
    table = embedding or head
    return others if table is None else {**others, EMBEDDING: table}


def _check_tensors(directory: Path, stored: dict[str, TensorEntry], destinations: dict[str, Destination]) -> None:
    for name, destination in destinations.items():
        expected = tuple(destination.shape)
        if name not in stored:
            remedy = _remedy_for_missing(name, stored)
            raise WeightsError(f"{directory}: tensor {name} of shape {expected} is missing; {remedy}")
        if stored[name].shape != expected:
            found = stored[name].shape
            raise WeightsError(
                f"{stored[name].path}: tensor {name} has shape {found}, expected {expected}; {MATCHING_FILES}"
            )
    for name in stored.keys() - destinations.keys():
        raise WeightsError(
            f"{stored[name].path}: tensor {name} is not part of a Llama with this config.json; {MATCHING_FILES}"
        )


def _remedy_for_missing(name: str, stored: dict[str, TensorEntry]) -> str:
    renamed = next((other for other in stored if other.endswith(f".{name}")), None)
    if renamed is not None:  # as by torch.compile or an incomplete merge
        return f"rename {renamed} and the other tensors to Llama's names"
    if name == HEAD:
        return "set tie_word_embeddings to true in config.json if the model uses the embedding, or fetch it again"
    return "fetch the checkpoint again"


def tensor_destinations(config: LlamaConfig, weights: Weights) -> dict[str, Destination]:
    """Return the memory for each tensor of a checkpoint, by its name there; parts of a fused matrix are views."""
    destinations: dict[str, Destination] = {EMBEDDING: weights.embedding, "model.norm.weight": weights.norm}
    if not config.tied_embeddings:
        destinations[HEAD] = weights.head
    layers: Sequence[LayerWeights[Tensor] | LayerWeights[PackedMatrix]] = weights.layers
    for index, layer in enumerate(layers):
        parts = _layer_destinations(config, layer)
        destinations |= {f"model.layers.{index}.{name}.weight": part for name, part in parts.items()}
    return destinations


def _layer_destinations(
    config: LlamaConfig, layer: LayerWeights[Tensor] | LayerWeights[PackedMatrix]
) -> dict[str, Destination]:
    keys = config.query_size
    values = keys + config.kv_size
    return {
        "input_layernorm": layer.attention_norm,
        "self_attn.q_proj": layer.qkv[:keys],
        "self_attn.k_proj": layer.qkv[keys:values],
        "self_attn.v_proj": layer.qkv[values:],
        "self_attn.o_proj": layer.output,
        "post_attention_layernorm": layer.mlp_norm,
        "mlp.gate_proj": layer.gate_up[: config.intermediate_size],
        "mlp.up_proj": layer.gate_up[config.intermediate_size :],
        "mlp.down_proj": layer.down,
    }


def _read_tensors(stored: dict[str, TensorEntry], destinations: dict[str, Destination], progress: Progress) -> None:
    """Read each tensor to its destination, in file order, which is fastest on spinning and network disks."""
    total_bytes = sum(tensor.size_bytes for tensor in stored.values())
    done_bytes = 0
    device = next(item.device for item in destinations.values() if isinstance(item, Tensor))
    local = threading.local()

    def create_buffers() -> None:
        local.buffers = ReadBuffers(device)

    def read(item: tuple[str, TensorEntry]) -> int:
        name, tensor = item
        _read_tensor(name, tensor, destinations[name], local.buffers)
        return tensor.size_bytes

    order = sorted(stored.items(), key=lambda item: (item[1].path, item[1].offset))
    with ThreadPoolExecutor(reader_threads(device), initializer=create_buffers) as pool:
        for size_bytes in pool.map(read, order):
            done_bytes += size_bytes
            progress(done_bytes, total_bytes)


def _read_tensor(name: str, tensor: TensorEntry, destination: Destination, buffers: ReadBuffers) -> None:
    if _read_finite(name, tensor, destination, buffers):
        return
    # Read again in the stored dtype, to find out whether the checkpoint or the conversion is the cause.
    as_stored = torch.empty(destination.shape, dtype=tensor.dtype)
    if _read_finite(name, tensor, as_stored, ReadBuffers(as_stored.device)):
        problem = f"contains values that do not fit in {destination.dtype}; set --dtype to the checkpoint's own dtype"
    else:
        problem = "contains NaN or infinity, expected finite numbers; fetch it again"
    raise WeightsError(f"{tensor.path}: tensor {name} {problem}")


def _read_finite(name: str, tensor: TensorEntry, destination: Destination, buffers: ReadBuffers) -> bool:
    """Read a tensor and return whether all its numbers are finite."""
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        try:
            if isinstance(destination, PackedMatrix):
                return _pack_rows(tensor, destination, buffers, file)
            return buffers.fill(destination, tensor.dtype, file)
        except EOFError:
            message = f"{tensor.path}: the file ends inside tensor {name}; fetch it again"
            raise WeightsError(message) from None


def _pack_rows(tensor: TensorEntry, matrix: PackedMatrix, buffers: ReadBuffers, file: BufferedReader) -> bool:
    blocks = buffers.read_rows(tensor, file, matrix.layout.group_rows)
    return all(matrix.pack(first, rows) for first, rows in blocks)


class MeasuredWeights(NamedTuple):
    """How the weights of a checkpoint would be stored on this machine."""

    kernels: str
    """The family of kernels that would run the model by default: portable or amx."""
    share: PackedShare


def measure_checkpoint(directory: Path) -> MeasuredWeights:
    """Read the matrices of a checkpoint and return their share in 12 bits, for the kernels that run it by default.

    Raises:
        WeightsError: the checkpoint cannot be served, or the native library is not available.
    """
    try:
        find_instructions()
    except NativeUnavailable as error:
        raise WeightsError(f"cannot measure weights: {error}") from error
    check_format(directory)
    config = read_config(directory)
    meta_weights = LlamaWeights.allocate(config, "meta", torch.float16)
    stored = read_checked_table(directory, config, meta_weights)
    layout = TileLayout() if runs_amx("auto", config, meta_weights.size_bytes) else ROWS
    buffers = ReadBuffers(torch.device("cpu"))
    matrices = {name: tensor for name, tensor in stored.items() if len(tensor.shape) == 2}
    shares = (_measure_matrix(name, tensor, layout, buffers) for name, tensor in matrices.items())
    return MeasuredWeights(layout.kernels, sum(shares, PackedShare()))


def _measure_matrix(name: str, tensor: TensorEntry, layout: WeightLayout, buffers: ReadBuffers) -> PackedShare:
    rows, width = tensor.shape
    formats = torch.empty(layout.groups(rows), dtype=torch.int64)
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        for first, block in buffers.read_rows(tensor, file, layout.group_rows):
            group = first // layout.group_rows
            if layout.measure(block, formats[group : group + layout.groups(len(block))]) is None:
                raise WeightsError(f"{tensor.path}: tensor {name} contains numbers that float16 cannot represent")
    return PackedShare.of(formats, (rows, width), layout)
