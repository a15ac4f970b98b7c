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
from llama2_server.engine.checkpoint.layout import read_json
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


def read_explicit_metadata(directory: Path) -> ModelMetadata:
    """Return the content of config.json and generation_config.json if both state every value, as the demo's do.

    transformers is not imported: it knows the values of fields that are left out, and rejects invalid ones.
    """
    raw, generation = read_json(directory / "config.json"), read_json(directory / "generation_config.json")
    config = LlamaConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        rms_norm_eps=raw["rms_norm_eps"],
        rope_theta=raw["rope_parameters"]["rope_theta"],
        max_positions=raw["max_position_embeddings"],
        tied_embeddings=raw["tie_word_embeddings"],
    )
    return ModelMetadata(config, frozenset({generation["eos_token_id"]}))


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
