"""The configuration and the tensor table of a Hugging Face Llama checkpoint. No tensor is read here."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llama2_server.engine.checkpoint.layout import check_architecture, read_headers, read_json
from llama2_server.engine.errors import WeightsError
from llama2_server.engine.model.weights import LlamaConfig

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers import LlamaConfig as HFConfig

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# Upper bounds, several times the largest published Llama. They are checked before anything is sized by them.
MAX_SIZES = {
    "vocab_size": 2**20,
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 1024,
    "max_position_embeddings": 2**24,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a safetensors file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def size_bytes(self) -> int:
        """Size of the tensor in the file, in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def read_config(directory: Path) -> LlamaConfig:
    """Return the model's shape.

    Raises:
        WeightsError: config.json is unreadable, or needs features beyond a plain Llama.
    """
    path = directory / "config.json"
    raw = read_json(path)
    check_architecture(path, raw)
    config = _parse_config(path, raw)
    _check_config(path, config)
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=_size(config, "num_key_value_heads"),
        head_dim=_size(config, "head_dim"),
        rms_norm_eps=float(config.rms_norm_eps),
        rope_theta=_rope(config)["rope_theta"],
        max_positions=config.max_position_embeddings,
        tied_embeddings=config.tie_word_embeddings,
    )


def read_eos_ids(directory: Path, vocab_size: int) -> frozenset[int]:
    """Return the token ids that end a generation, from generation_config.json or else config.json.

    Raises:
        WeightsError: neither file contains such ids, an id is not in [0, vocab_size), or a file is unreadable.
    """
    path, ids = directory / "generation_config.json", None
    if path.is_file():
        ids = _parse_generation_config(directory).eos_token_id
    if ids is None:
        path = directory / "config.json"
        ids = read_json(path).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    if not ids or not all(type(token_id) is int for token_id in ids):
        raise WeightsError(
            f"{directory}: eos_token_id is {ids}, expected token ids that end a reply; set it in generation_config.json"
        )
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise WeightsError(
                f"{path}: eos_token_id is {token_id}, expected an id below vocab_size, {vocab_size}; "
                "set it to the id of </s> in the tokenizer, or use the file of the same checkpoint"
            )
    return frozenset(ids)


def read_tensor_table(directory: Path) -> dict[str, TensorEntry]:
    """Return the file, dtype, shape and offset of each tensor of the checkpoint, without rotary buffers.

    Pickle files are never opened, because loading one can run any code in it.

    Raises:
        WeightsError: a file is missing, truncated or not safetensors, or two files contain the same tensor.
    """
    return {
        name: TensorEntry(entry.path, DTYPES[entry.dtype], entry.shape, entry.offset)
        for name, entry in read_headers(directory).items()
    }


def _parse_config(path: Path, raw: dict[str, Any]) -> "HFConfig":
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig as HFConfig  # takes seconds to import

    try:
        with _without_warnings():
            config = HFConfig.from_dict(raw)
    except (StrictDataclassError, TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise WeightsError(f"{path}: {' '.join(str(error).split())}; fetch it again") from error
    for name, limit in MAX_SIZES.items():
        size = _size(config, name)
        if type(size) is not int or size < 1:
            raise WeightsError(f"{path}: {name} is {size!r}, expected a positive integer; fetch it again")
        if size > limit:
            raise WeightsError(f"{path}: {name} is {size}, expected at most {limit}; fetch it again")
    return config


def _parse_generation_config(directory: Path) -> "GenerationConfig":
    from transformers import GenerationConfig  # takes seconds to import

    path = directory / "generation_config.json"
    read_json(path)
    try:
        with _without_warnings():
            return GenerationConfig.from_pretrained(directory)
    # Each entry has its own parser in transformers, and they raise various exceptions. All mean an invalid entry.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise WeightsError(
            f"{path}: transformers rejects it ({reason}); correct the entry, or remove the file to use the "
            "eos_token_id of config.json"
        ) from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress transformers' warnings during the body: raw lines on stderr next to the error of the server."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_config(path: Path, config: "HFConfig") -> None:
    heads, kv_heads = config.num_attention_heads, _size(config, "num_key_value_heads")
    for name, found, expected in (
        ("rope_scaling", _rope(config).get("rope_type"), "default"),
        ("attention_bias", config.attention_bias, False),
        ("mlp_bias", config.mlp_bias, False),
        ("hidden_act", config.hidden_act, "silu"),
        ("num_attention_heads modulo num_key_value_heads", heads % kv_heads, 0),
    ):
        if found != expected:
            raise WeightsError(f"{path}: {name} is {found!r}, expected {expected!r}; pass a plain Llama checkpoint")
    for name, number, low, high in (
        ("rope_theta", _rope(config).get("rope_theta"), 1.0, 1e12),
        ("rms_norm_eps", config.rms_norm_eps, 0.0, 1.0),
    ):
        if not isinstance(number, int | float) or not low <= number <= high:
            raise WeightsError(
                f"{path}: {name} is {number!r}, expected a number in [{low:g}, {high:g}]; fetch it again"
            )


def _size(config: "HFConfig", name: str) -> int:
    """Return a size that may be missing in the file; transformers then derives it from others."""
    size: int = getattr(config, name)
    return size


def _rope(config: "HFConfig") -> dict[str, Any]:
    return dict(config.rope_parameters or {})
