"""The configuration cache returns the result of transformers, and never caches a rejected configuration."""

import json
import shutil
from pathlib import Path

import pytest
from tests.support.checkpoints import MakeCheckpoint

from llama2_server.engine.checkpoint import config_cache, files
from llama2_server.engine.checkpoint.config_cache import ModelMetadata, read_explicit_metadata, read_metadata
from llama2_server.engine.errors import WeightsError
from llama2_server.lifecycle.checks.checkpoint import demo_checkpoint


@pytest.fixture
def directory(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A copy of a checkpoint's configuration, which a test may change."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(checkpoint() / name, copy)
    return copy


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """One entry for each time that transformers reads the configuration."""
    calls: list[Path] = []
    read_config = files.read_config

    def counted(directory: Path) -> object:
        calls.append(directory)
        return read_config(directory)

    monkeypatch.setattr(files, "read_config", counted)
    return calls


def edit(directory: Path, name: str, **changes: object) -> None:
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def uncached(directory: Path) -> ModelMetadata:
    config = files.read_config(directory)
    return ModelMetadata(config, files.read_eos_ids(directory, config.vocab_size))


def test_the_second_start_returns_the_same(directory: Path, tmp_path: Path, reads: list[Path]) -> None:
    """The cached configuration equals the read one to the last digit, and is not read again."""
    edit(directory, "config.json", rms_norm_eps=1.2345678901234567e-06)
    edit(directory, "generation_config.json", eos_token_id=[2, 5])
    file = tmp_path / "there" / "checkpoint.json"
    first = read_metadata(directory, file)
    assert read_metadata(directory, file) == first
    assert len(reads) == 1
    assert first == uncached(directory)


def test_changes_are_read_again(
    directory: Path, tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of either file, of the version of transformers, or of our parser."""
    file = tmp_path / "checkpoint.json"
    read_metadata(directory, file)
    edit(directory, "config.json", rope_theta=5e5)
    assert read_metadata(directory, file).config.rope_theta == 5e5
    edit(directory, "generation_config.json", eos_token_id=7)
    assert read_metadata(directory, file).eos_ids == {7}
    (directory / "generation_config.json").unlink()
    read_metadata(directory, file)
    assert len(reads) == 4
    monkeypatch.setattr(config_cache, "version", lambda package: "another")
    read_metadata(directory, file)
    monkeypatch.setattr(files, "__file__", str(Path(__file__)))
    read_metadata(directory, file)
    assert len(reads) == 6


@pytest.mark.parametrize("broken", ["", "{", "[]", "null", '{"key": 1}', None])
def test_a_broken_cache_is_replaced(directory: Path, tmp_path: Path, reads: list[Path], broken: str | None) -> None:
    """A damaged cache file does not change the result; None stands for a file with a missing field."""
    file = tmp_path / "checkpoint.json"
    first = read_metadata(directory, file)
    if broken is None:
        document = json.loads(file.read_text())
        del document["value"]["config"]["layers"]
        broken = json.dumps(document)
    file.write_text(broken)
    assert read_metadata(directory, file) == first
    assert read_metadata(directory, file) == first
    assert len(reads) == 2


def test_an_unwritable_cache_is_only_logged(
    directory: Path, tmp_path: Path, reads: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """If the data directory is not writable, the configuration is read each time and a warning is logged."""
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert read_metadata(directory, tmp_path / "file" / "checkpoint.json") == uncached(directory)
    assert len(reads) == 2 + 2
    assert caplog.text.count("cannot write the cache file; the next start will be slower: ") == 2


def test_a_rejected_configuration_is_not_cached(directory: Path, tmp_path: Path) -> None:
    """An unusable model is rejected at each start, for the same reason."""
    edit(directory, "generation_config.json", eos_token_id=[])
    for _ in range(2):
        with pytest.raises(WeightsError, match="eos_token_id is"):
            read_metadata(directory, tmp_path / "checkpoint.json")
    assert not (tmp_path / "checkpoint.json").exists()
    with pytest.raises(WeightsError, match="no such file"):
        read_metadata(tmp_path / "nowhere", tmp_path / "checkpoint.json")


def test_the_demo_states_every_value() -> None:
    """The configuration of the demo without transformers equals the one that transformers reads."""
    assert read_explicit_metadata(demo_checkpoint()) == uncached(demo_checkpoint())
