"""Fixtures of the engine's integration tests."""

import pytest
from tests.support.checkpoints import MakeCheckpoint, cached_make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Return the function that makes checkpoints."""
    return cached_make_checkpoint(tmp_path_factory.mktemp)
