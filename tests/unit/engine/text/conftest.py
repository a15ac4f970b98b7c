"""A large vocabulary, created once for the tests of tokenizers."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.checkpoints import VOCAB_SIZE, make_large_tokenizer, save_tokenizer_json


@pytest.fixture(scope="session")
def saved(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a large vocabulary in both files."""
    directory = tmp_path_factory.mktemp("saved")
    shutil.copy(checkpoint() / "tokenizer_config.json", directory)
    make_large_tokenizer(directory / "tokenizer.model", VOCAB_SIZE)
    save_tokenizer_json(directory)
    return directory
