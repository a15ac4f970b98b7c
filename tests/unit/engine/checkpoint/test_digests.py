"""The optional digest file of a checkpoint."""

import logging
import subprocess
from pathlib import Path

import pytest
from tests.unit.engine.checkpoint.loading import load

from llama2_server.engine.errors import WeightsError


def write_digests(directory: Path) -> None:
    """Write SHA256SUMS with the program that operators use."""
    names = sorted(path.name for path in directory.iterdir())
    sums = subprocess.run(["sha256sum", *names], cwd=directory, capture_output=True, check=True).stdout
    (directory / "SHA256SUMS").write_bytes(sums)


def flip_bit(path: Path, offset: int) -> None:
    """Flip the lowest bit of one byte; a negative offset counts from the end."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_matching_digests_are_logged(sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint with correct digests is served, and one log line states how many files match."""
    write_digests(sharded)
    with caplog.at_level(logging.INFO):
        load(sharded)
    count = len(list(sharded.iterdir())) - 1
    assert f"the SHA-256 digests of {count} files match {sharded / 'SHA256SUMS'}" in caplog.messages


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_one_flipped_bit_of_the_weights_is_rejected(sharded: Path, name: str) -> None:
    """Without a digest file a flipped bit is served as another number; with one it is rejected by the file's name."""
    flip_bit(sharded / name, -1)
    load(sharded)
    flip_bit(sharded / name, -1)
    write_digests(sharded)
    load(sharded)
    flip_bit(sharded / name, -1)
    with pytest.raises(WeightsError, match=rf"{name}: its SHA-256 digest is .* fetch the file again$"):
        load(sharded)


def test_a_listed_file_must_exist(sharded: Path) -> None:
    """A digest of a file that is missing is an error too."""
    (sharded / "extra.txt").write_text("x")
    write_digests(sharded)
    (sharded / "extra.txt").unlink()
    with pytest.raises(WeightsError, match=r"extra\.txt: cannot be read: No such file"):
        load(sharded)
