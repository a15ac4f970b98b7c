"""Change the files of a checkpoint, and load it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.model.llama import LlamaModel

Edit = Callable[[Path], object]
"""Changes the checkpoint in a directory."""


def load(directory: Path, dtype: torch.dtype = torch.float32, context_length: int = 32, **options: Any) -> LlamaModel:
    return load_model(directory, device="cpu", dtype=dtype, context_length=context_length, slots=1, **options)


def edit_json(directory: Path, name: str, **changes: Any) -> None:
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(
    directory: Path, change: Callable[[dict[str, Tensor]], object], name: str = "model.safetensors"
) -> None:
    tensors = load_file(directory / name)
    change(tensors)
    save_file(tensors, directory / name, {"format": "pt"})


def config(**changes: Any) -> Edit:
    return lambda directory: edit_json(directory, "config.json", **changes)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Edit:
    return lambda directory: edit_tensors(directory, change)


def overwrite(name: str, content: bytes) -> Edit:
    return lambda directory: (directory / name).write_bytes(content)


def remove(name: str) -> Edit:
    return lambda directory: (directory / name).unlink()


def truncate(name: str) -> Edit:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:-1])


def only_pickles(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
