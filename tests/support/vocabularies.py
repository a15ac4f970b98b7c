"""Tokenizers of the size of Llama-2's, and their `tokenizer.json`."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as model_proto
from tools.make_checkpoint import make_tokenizer
from transformers import LlamaTokenizer

NORMAL = 1  # sentencepiece_model.proto: ModelProto.SentencePiece.Type
MAX_PIECE_CHARACTERS = 10
VOCAB_SIZE = 32000  # of Llama-2


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
