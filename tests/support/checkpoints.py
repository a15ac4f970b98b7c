"""Small checkpoints for tests: random weights, edited files, and large vocabularies."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2 as model_proto
from tools.make_checkpoint import Shape, make_checkpoint, make_tokenizer
from torch import Tensor

NORMAL = 1  # sentencepiece_model.proto: ModelProto.SentencePiece.Type
MAX_PIECE_CHARACTERS = 10
VOCAB_SIZE = 32000  # of Llama-2

Edit = Callable[[Path], object]
"""Changes the checkpoint in a directory."""


class MakeCheckpoint(Protocol):
    """Return a checkpoint with these fields of Shape; equal arguments return the same directory, which is read-only."""

    def __call__(self, *, shards: int = 1, dtype: torch.dtype = torch.float32, **shape: Any) -> Path: ...


def cached_make_checkpoint(directory: Callable[[str], Path]) -> MakeCheckpoint:
    """Return a function that makes each checkpoint once, in a new folder from `directory`."""
    made: dict[str, Path] = {}

    def make(*, shards: int = 1, dtype: torch.dtype = torch.float32, **shape: Any) -> Path:
        key = f"{shape}-{shards}-{dtype}"
        if key not in made:
            made[key] = make_checkpoint(directory("made"), Shape(**shape), shards=shards, dtype=dtype)
        return made[key]

    return make


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


def make_large_tokenizer(path: Path, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> None:
    """Write a byte-fallback BPE tokenizer whose pieces are random merges of shorter pieces."""
    make_tokenizer(path, 600)
    model = model_proto.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    trained = [piece for piece in model.pieces if piece.type == NORMAL]
    known = {piece.piece for piece in model.pieces}
    parts = [piece.piece for piece in trained]
    chooser = random.Random(seed)
    while len(known) < vocab_size:
        merged = chooser.choice(parts) + chooser.choice(parts)
        if merged not in known and len(merged) <= MAX_PIECE_CHARACTERS:
            known.add(merged)
            parts.append(merged)
            model.pieces.add(piece=merged, score=-len(known), type=NORMAL)
    model.trainer_spec.vocab_size = len(model.pieces)
    path.write_bytes(model.SerializeToString())


def save_tokenizer_json(directory: Path, **options: Any) -> Path:
    """Save the tokenizer of a checkpoint as current transformers does, and return its `tokenizer.json`."""
    from transformers import LlamaTokenizer  # slow, and not needed by most tests

    LlamaTokenizer.from_pretrained(directory, **options).save_pretrained(directory)
    return directory / "tokenizer.json"


def pieces_of(path: Path) -> list[str]:
    """Return the texts of the normal pieces of a `tokenizer.model`."""
    model = model_proto.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    return [piece.piece.replace("\u2581", " ") for piece in model.pieces if piece.type == NORMAL]


def edit_tokenizer_json(source: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Write an edited copy of the tokenizer.json in `source` to the folder `target`, and return its path."""
    document = json.loads((source / "tokenizer.json").read_text())
    edit(document)
    path = target / "tokenizer.json"
    path.write_text(json.dumps(document))
    return path
