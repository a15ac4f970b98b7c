"""A cache of the parsed configuration of a checkpoint, so that later starts do not import transformers.

For a small model, that import takes longer than the rest of the start.
"""

import hashlib
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama2_server.engine import disk_cache
from llama2_server.engine.checkpoint import files
from llama2_server.engine.model.weights import LlamaConfig


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """A model's shape, and the token ids that end a generation."""

    config: LlamaConfig
    eos_ids: frozenset[int]


def read_metadata(directory: Path, file: Path) -> ModelMetadata:
    """Return the content of config.json and generation_config.json, cached in `file` for the next start.

    The files are read again if they, the version of transformers or our parser have changed. A rejected configuration
    is never cached.

    Raises:
        WeightsError: the server cannot serve this model.
    """
    key = _key(directory)
    metadata = _from_json(disk_cache.load(file, key))
    if metadata is None:
        config = files.read_config(directory)
        metadata = ModelMetadata(config, files.read_eos_ids(directory, config.vocab_size))
        disk_cache.save(file, key, {"config": asdict(metadata.config), "eos_ids": sorted(metadata.eos_ids)})
    return metadata


def _from_json(value: Any) -> ModelMetadata | None:
    try:
        return ModelMetadata(LlamaConfig(**value["config"]), frozenset(value["eos_ids"]))
    except (TypeError, KeyError):  # not cached, or not the fields of ModelMetadata
        return None


def _key(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in (directory / "config.json", directory / "generation_config.json", Path(files.__file__)):
        content = path.read_bytes() if path.is_file() else b""
        digest.update(len(content).to_bytes(8) + content)
    return f"{digest.hexdigest()}, transformers {version('transformers')}"
