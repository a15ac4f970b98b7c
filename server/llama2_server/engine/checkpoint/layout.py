"""The files of a checkpoint as far as they can be read without torch: JSON files, and the headers of safetensors files.

A start checks them before it imports torch, which takes seconds.
"""

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llama2_server.engine.errors import WeightsError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_PATTERNS = ("*.bin", "*.pth", "*.pt")
QUANTIZERS = {"awq": "AWQ", "gptq": "GPTQ"}
# Rotary buffers, per layer or for the whole model: inv_freq, cos_cached and others. They follow from the configuration.
DERIVED = re.compile(r"(model\.)?(layers\.\d+\.)?(self_attn\.)?rotary_emb\.\w+")
# The dtypes of safetensors that the server reads.
DTYPE_NAMES = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """A tensor in the header of a safetensors file."""

    path: Path
    dtype: str
    """One of DTYPE_NAMES."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def read_headers(directory: Path) -> dict[str, HeaderEntry]:
    """Return the tensors of the checkpoint by name, without rotary buffers.

    Pickle files are never opened, because loading one can run any code in it.

    Raises:
        WeightsError: a file is missing, truncated or not safetensors, or two files contain the same tensor.
    """
    table: dict[str, HeaderEntry] = {}
    for path in _shards(directory):
        for name, tensor in _read_header(path):
            if name in table:
                raise WeightsError(
                    f"{path}: contains tensor {name}, which {table[name].path.name} contains too; fetch both again"
                )
            table[name] = tensor
    return table


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of the checkpoint.

    Raises:
        WeightsError: the file is missing, unreadable or has no JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file; pass the directory of a Hugging Face Llama checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not valid JSON: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: contains a JSON {type(content).__name__}, expected an object; fetch it again")
    return content


def check_architecture(path: Path, raw: dict[str, Any]) -> None:
    """Check the content of a config.json, without transformers.

    Raises:
        WeightsError: it is not the configuration of an unquantized Llama.
    """
    if raw.get("architectures") != ["LlamaForCausalLM"] or raw.get("model_type") != "llama":
        found = f"{raw.get('architectures')} of model_type {raw.get('model_type')!r}"
        raise WeightsError(
            f"{path}: architectures is {found}, expected ['LlamaForCausalLM'] of model_type 'llama'; "
            "pass a Llama checkpoint"
        )
    for key in ("quantization_config", "quantization"):  # the second by MLX
        if (quantization := raw.get(key)) is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            name = f"with {QUANTIZERS.get(method, method)} " if isinstance(method, str) else ""
            raise WeightsError(
                f"{path}: the weights are quantized {name}({key}); pass a checkpoint with unquantized weights"
            )


def check_context(directory: Path, max_positions: int, context_length: int) -> None:
    """Check that the model was trained for the context of the card.

    Raises:
        WeightsError: it was not.
    """
    if context_length > max_positions:
        raise WeightsError(
            f"{directory / 'config.json'}: max_position_embeddings is {max_positions}, "
            f"expected at least {context_length}; if the model was trained with a longer context, as Llama-2 was with "
            "4096 tokens, set --max-position-embeddings; otherwise lower context_length_limit in the card (--card)"
        )


def _shards(directory: Path) -> list[Path]:
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return [single]
    if index.is_file():
        return _indexed_shards(index)
    pickles = sorted(path.name for pattern in PICKLE_PATTERNS for path in directory.glob(pattern))
    if pickles:
        raise WeightsError(
            f"{directory}: has only pickle files ({pickles[0]}), which can run code when loaded; fetch the "
            "checkpoint's safetensors files, or convert it with transformers' save_pretrained"
        )
    raise WeightsError(f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}; fetch the checkpoint again")


def _indexed_shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: has no weight_map of tensor names to files; fetch it again")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name:
            raise WeightsError(f"{index}: names {name!r}, expected a file in the same directory; fetch it again")
        if not (index.parent / name).is_file():
            raise WeightsError(f"{index.parent / name}: no such file, but {index.name} names it; fetch it again")
    return [index.parent / name for name in names]


def _read_header(path: Path) -> Iterator[tuple[str, HeaderEntry]]:
    """Yield the tensors of a file by name; https://github.com/huggingface/safetensors#format describes the format."""
    try:
        # The library validates the header and the size of the file, but does not return the offsets.
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a complete safetensors file: {error}; fetch it again") from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if DERIVED.fullmatch(name):
            continue
        if entry["dtype"] not in DTYPE_NAMES:
            raise WeightsError(
                f"{path}: tensor {name} has dtype {entry['dtype']}, expected one of {', '.join(DTYPE_NAMES)}; "
                "pass an unquantized checkpoint"
            )
        start = 8 + length + entry["data_offsets"][0]
        yield name, HeaderEntry(path, entry["dtype"], tuple(entry["shape"]), start)
