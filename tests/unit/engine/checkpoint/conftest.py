"""Checkpoints that a test may change."""

import shutil
from pathlib import Path

import pytest
from tests.support.checkpoints import MakeCheckpoint


@pytest.fixture
def copy(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint in one file."""
    return Path(shutil.copytree(checkpoint(), tmp_path / "copy"))


@pytest.fixture
def sharded(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A checkpoint in two files."""
    return Path(shutil.copytree(checkpoint(shards=2), tmp_path / "sharded"))
