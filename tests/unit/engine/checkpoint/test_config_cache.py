"""What is kept of a checkpoint's configuration: it must say what transformers would, and nothing that was refused."""

import json
import shutil
from pathlib import Path

import pytest
from tests.support.checkpoints import MakeCheckpoint

from llama2_server.engine.checkpoint import config_cache as description_module
from llama2_server.engine.checkpoint import files as checkpoint_module
from llama2_server.engine.checkpoint.config_cache import ModelMetadata, read_metadata
from llama2_server.engine.errors import WeightsError


@pytest.fixture
def directory(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """The configuration of a checkpoint, which a test may change."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(checkpoint() / name, copy)
    return copy


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Each time that the configuration was read by transformers."""
    made: list[Path] = []
    read_config = checkpoint_module.read_config

    def counted(directory: Path) -> object:
        made.append(directory)
        return read_config(directory)

    monkeypatch.setattr(checkpoint_module, "read_config", counted)
    return made


def edit(directory: Path, name: str, **changes: object) -> None:
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def plain(directory: Path) -> ModelMetadata:
    return ModelMetadata(checkpoint_module.read_config(directory), checkpoint_module.read_eos_ids(directory))


def test_the_second_start_says_the_same(directory: Path, tmp_path: Path, reads: list[Path]) -> None:
    """What was kept is what was read, to the last digit, and is not read again."""
    edit(directory, "config.json", rms_norm_eps=1.2345678901234567e-06)
    edit(directory, "generation_config.json", eos_token_id=[2, 5])
    file = tmp_path / "there" / "checkpoint.json"
    first = read_metadata(directory, file)
    assert read_metadata(directory, file) == first
    assert len(reads) == 1
    assert first == plain(directory)


def test_what_has_changed_is_read_anew(
    directory: Path, tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either file, the version of transformers, and our own code, which says what of its answer is used."""
    file = tmp_path / "checkpoint.json"
    read_metadata(directory, file)
    edit(directory, "config.json", rope_theta=5e5)
    assert read_metadata(directory, file).config.rope_theta == 5e5
    edit(directory, "generation_config.json", eos_token_id=7)
    assert read_metadata(directory, file).eos_ids == {7}
    (directory / "generation_config.json").unlink()
    read_metadata(directory, file)
    assert len(reads) == 4
    monkeypatch.setattr(description_module, "version", lambda package: "another")
    read_metadata(directory, file)
    monkeypatch.setattr(checkpoint_module, "__file__", str(Path(__file__)))
    read_metadata(directory, file)
    assert len(reads) == 6


@pytest.mark.parametrize("broken", ["", "{", "[]", "null", '{"key": 1}', None])
def test_a_broken_file_is_read_anew(directory: Path, tmp_path: Path, reads: list[Path], broken: str | None) -> None:
    """Whatever became of the file, the answer is the same; None stands for one that misses a part."""
    file = tmp_path / "checkpoint.json"
    first = read_metadata(directory, file)
    if broken is None:
        document = json.loads(file.read_text())
        del document["kept"]["config"]["layers"]
        broken = json.dumps(document)
    file.write_text(broken)
    assert read_metadata(directory, file) == first
    assert read_metadata(directory, file) == first
    assert len(reads) == 2


def test_nowhere_to_keep_it_is_no_harm(
    directory: Path, tmp_path: Path, reads: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A data directory that cannot be written to costs time at the next start, and a line in the log."""
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert read_metadata(directory, tmp_path / "file" / "checkpoint.json") == plain(directory)
    assert len(reads) == 2 + 2
    assert caplog.text.count("the next start has to find out again what takes time") == 2


def test_what_is_refused_is_not_kept(directory: Path, tmp_path: Path) -> None:
    """A model that cannot be served is refused at each start, for the same reason."""
    edit(directory, "generation_config.json", eos_token_id=[])
    for _ in range(2):
        with pytest.raises(WeightsError, match="eos_token_id is"):
            read_metadata(directory, tmp_path / "checkpoint.json")
    assert not (tmp_path / "checkpoint.json").exists()
    with pytest.raises(WeightsError, match="no such file"):
        read_metadata(tmp_path / "nowhere", tmp_path / "checkpoint.json")
