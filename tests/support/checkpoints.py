"""Checkpoints with random weights for the tests of the engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from tools.make_checkpoint import Shape, make_checkpoint


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
