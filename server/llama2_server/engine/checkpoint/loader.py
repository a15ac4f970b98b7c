"""A checkpoint's tensors, verified and read straight into their final place on the device."""

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from llama2_server.engine.checkpoint.files import TensorEntry, read_config, read_tensor_table
from llama2_server.engine.checkpoint.hub import fetch_checkpoint
from llama2_server.engine.checkpoint.read_buffers import ReadBuffers
from llama2_server.engine.errors import WeightsError
from llama2_server.engine.model.kv_cache import KVCache
from llama2_server.engine.model.llama import CpuKernels, LlamaModel
from llama2_server.engine.model.weights import LayerWeights, LlamaConfig, LlamaWeights
from llama2_server.engine.text.tokenizer import Tokenizer

__all__ = ["fetch_checkpoint", "load_model"]

# Checkpoints from before transformers 4.31 carry the rotary frequencies, which follow from the configuration.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
# Threads that fill memory: new pages take one longer than the reading does.
CPU_READERS = 2

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def load_model(
    directory: Path,
    *,
    device: str,
    dtype: torch.dtype,
    context_length: int,
    slots: int,
    config: LlamaConfig | None = None,
    progress: Progress | None = None,
    cpu_kernels: CpuKernels = "auto",
) -> LlamaModel:
    """The checkpoint as a model with room for `slots` sequences of `context_length` tokens.

    `config` is what `read_config` says, where that is known.

    Raises WeightsError, before any memory is taken where the headers tell, if the checkpoint is incomplete, of another
    architecture, does not fit its tokenizer, or holds values that are not finite in `dtype`.
    """
    config = config or read_config(directory)
    _check_context(directory, config, context_length)
    _check_tokenizer(directory, config)
    stored = {name: tensor for name, tensor in read_tensor_table(directory).items() if not IGNORED.fullmatch(name)}
    imagined = LlamaWeights.allocate(config, "meta", dtype)
    _check_tensors(directory, stored, places(config, imagined))
    cache_bytes = KVCache.size_bytes(config, slots, context_length, dtype)
    _check_memory(directory, device, imagined.size_bytes, cache_bytes, f"{slots} x {context_length} tokens")
    try:
        weights = LlamaWeights.allocate(config, device, dtype)
        _fill(stored, places(config, weights), progress or _no_progress)
        return LlamaModel(config, weights, context_length=context_length, slots=slots, cpu_kernels=cpu_kernels)
    except torch.OutOfMemoryError as error:
        raise WeightsError(f"{directory}: weights and KV cache do not fit on {device}: {error}") from error


def _no_progress(done_bytes: int, total_bytes: int) -> None:
    pass


def _check_memory(directory: Path, device: str, weights_bytes: int, cache_bytes: int, tokens: str) -> None:
    """Say before anything is read that it cannot fit; what else there is in the device's memory counts as taken."""
    if torch.device(device).type != "cuda":
        return
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    needed_bytes = weights_bytes + cache_bytes
    if needed_bytes > free_bytes:
        raise WeightsError(
            f"{directory}: needs {needed_bytes / 1e9:.1f} GB on {device} ({weights_bytes / 1e9:.1f} of weights, "
            f"{cache_bytes / 1e9:.1f} of KV cache for {tokens}), and {free_bytes / 1e9:.1f} of "
            f"{total_bytes / 1e9:.1f} GB are free; free some, or lower the card's context length or number of slots"
        )


def _check_context(directory: Path, config: LlamaConfig, context_length: int) -> None:
    if context_length > config.max_positions:
        raise WeightsError(
            f"{directory / 'config.json'}: max_position_embeddings is {config.max_positions}, "
            f"expected at least the context length of {context_length}"
        )


def _check_tokenizer(directory: Path, config: LlamaConfig) -> None:
    path = directory / "tokenizer.model"
    pieces = Tokenizer(path).vocab_size
    if pieces > config.vocab_size:
        raise WeightsError(f"{path}: has {pieces} tokens, expected at most the {config.vocab_size} of the embedding")


def _check_tensors(directory: Path, stored: dict[str, TensorEntry], places: dict[str, Tensor]) -> None:
    for name, place in places.items():
        if name not in stored:
            raise WeightsError(f"{directory}: tensor {name} is missing, expected one of shape {tuple(place.shape)}")
        if stored[name].shape != place.shape:
            found, expected = stored[name].shape, tuple(place.shape)
            raise WeightsError(f"{stored[name].path}: tensor {name} is of shape {found}, expected {expected}")
    for name in stored.keys() - places.keys():
        raise WeightsError(f"{stored[name].path}: tensor {name} is not part of a Llama with this config.json")


def places(config: LlamaConfig, weights: LlamaWeights) -> dict[str, Tensor]:
    """Where each tensor of a checkpoint belongs, by its name there; parts of a fused matrix are views of it."""
    places = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    if not config.tied_embeddings:
        places["lm_head.weight"] = weights.head
    for index, layer in enumerate(weights.layers):
        parts = _layer_places(config, layer)
        places |= {f"model.layers.{index}.{name}.weight": place for name, place in parts.items()}
    return places


def _layer_places(config: LlamaConfig, layer: LayerWeights) -> dict[str, Tensor]:
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


def _fill(stored: dict[str, TensorEntry], places: dict[str, Tensor], progress: Progress) -> None:
    """Read each tensor into its place, in the order of the files, which spinning and network disks like best."""
    total_bytes = sum(tensor.size_bytes for tensor in stored.values())
    done_bytes = 0
    device = next(iter(places.values())).device
    own = threading.local()

    def prepare() -> None:
        own.staging = ReadBuffers(device)

    def fill(item: tuple[str, TensorEntry]) -> int:
        name, tensor = item
        _fill_one(name, tensor, places[name], own.staging)
        return tensor.size_bytes

    order = sorted(stored.items(), key=lambda item: (item[1].path, item[1].offset))
    with ThreadPoolExecutor(CPU_READERS if device.type == "cpu" else 1, initializer=prepare) as pool:
        for size_bytes in pool.map(fill, order):
            done_bytes += size_bytes
            progress(done_bytes, total_bytes)


def _fill_one(name: str, tensor: TensorEntry, place: Tensor, staging: ReadBuffers) -> None:
    if _read(name, tensor, place, staging):
        return
    # As it is stored, so that whoever made it knows what is wrong.
    as_stored = torch.empty(place.shape, dtype=tensor.dtype)
    if _read(name, tensor, as_stored, ReadBuffers(as_stored.device)):
        found = f"holds values that do not fit in {place.dtype}; serve it with the dtype of the checkpoint"
    else:
        found = "holds NaN or infinity; expected finite numbers: fetch it again"
    raise WeightsError(f"{tensor.path}: tensor {name} {found}")


def _read(name: str, tensor: TensorEntry, place: Tensor, staging: ReadBuffers) -> bool:
    """Whether all its numbers are finite."""
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        try:
            return staging.fill(place, tensor.dtype, file)
        except EOFError:
            message = f"{tensor.path}: ended inside tensor {name} while being read; fetch it again"
            raise WeightsError(message) from None
