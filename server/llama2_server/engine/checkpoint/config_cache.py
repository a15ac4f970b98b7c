"""What a checkpoint's configuration says, which transformers is asked only once.

Importing transformers takes longer than all the rest of a small model's start.
"""

import hashlib
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama2_server.engine.checkpoint import files as checkpoint
from llama2_server.engine.disk_cache import load, save
from llama2_server.engine.model.weights import LlamaConfig


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """A model's shape, and the token ids that end a generation."""

    config: LlamaConfig
    eos_ids: frozenset[int]


def read_metadata(directory: Path, file: Path) -> ModelMetadata:
    """Read config.json and generation_config.json; `file` keeps the answer for the next start.

    They are read anew when they, transformers, or our own reading of its answer have changed. What is refused is never
    kept.

    Raises:
        WeightsError: the model is none that can be served.
    """
    key = _key(directory)
    description = _kept(load(file, key))
    if description is None:
        description = ModelMetadata(checkpoint.read_config(directory), checkpoint.read_eos_ids(directory))
        save(file, key, {"config": asdict(description.config), "eos_ids": sorted(description.eos_ids)})
    return description


def _kept(kept: Any) -> ModelMetadata | None:
    try:
        return ModelMetadata(LlamaConfig(**kept["config"]), frozenset(kept["eos_ids"]))
    except (TypeError, KeyError):  # nothing was kept, or no description
        return None


def _key(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in (directory / "config.json", directory / "generation_config.json", Path(checkpoint.__file__)):
        content = path.read_bytes() if path.is_file() else b""
        digest.update(len(content).to_bytes(8) + content)
    return f"{digest.hexdigest()}, transformers {version('transformers')}"
