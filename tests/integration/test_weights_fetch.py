"""`llama2-server weights fetch`: a directory with the complete checkpoint, or no directory."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import errors as hub_errors
from tests.support.processes import environment

from llama2_server.cli.main import program

CHECKPOINT = {"config.json": "{}", "model.safetensors": "tensors", "tokenizer.model": "pieces"}


class Hub:
    """Fake Hub: a download writes one file after another, and fails after `fails_after` files."""

    def __init__(self) -> None:
        self.fails_after: int | None = None
        self.written: list[str] = []
        self.requests: list[tuple[str, str | None]] = []

    def snapshot_download(
        self, repository: str, *, revision: str | None, local_dir: Path, allow_patterns: list[str]
    ) -> str:
        self.requests.append((repository, revision))
        local_dir.mkdir(parents=True, exist_ok=True)
        for index, (name, content) in enumerate(CHECKPOINT.items()):
            if index == self.fails_after:
                raise ConnectionError("reset by peer")
            if not (local_dir / name).exists():
                (local_dir / name).write_text(content)
                self.written.append(name)
        return str(local_dir)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A fake Hub in place of the real one."""
    fake = Hub()
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    # click's runner calls the command in this process, whose signal handlers must not change.
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return fake


def fetch(directory: Path, *more: str, repository: str = "org/name") -> Result:
    return CliRunner().invoke(program, ["weights", "fetch", repository, "--to", str(directory), *more])


def files_in(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_fetches_once(hub: Hub, tmp_path: Path) -> None:
    """The first call downloads the checkpoint; the next one finds the directory and does not call the Hub."""
    directory = tmp_path / "models" / "name"
    first, second = fetch(directory), fetch(directory)
    assert (first.exit_code, first.output) == (0, f"{directory}: fetched\n")
    assert (second.exit_code, second.output) == (0, f"{directory}: already present\n")
    assert hub.requests == [("org/name", None)]
    assert files_in(directory) == {**CHECKPOINT, "fetched-from.txt": "org/name\n"}


def test_interrupted_fetch_leaves_no_directory_and_is_resumed(hub: Hub, tmp_path: Path) -> None:
    """The directory does not exist until the fetch is complete; the next fetch keeps the files that arrived."""
    directory = tmp_path / "name"
    hub.fails_after = 2
    interrupted = fetch(directory)
    assert interrupted.exit_code == 2
    assert "llama2-server: org/name: download from the Hugging Face Hub failed" in interrupted.output
    assert "reset by peer" in interrupted.output
    assert not directory.exists()
    hub.fails_after = None
    assert fetch(directory).exit_code == 0
    assert hub.written == list(CHECKPOINT)  # no file was fetched twice
    assert not list(tmp_path.glob(".*.partial"))


def test_partial_files_of_another_checkpoint_are_not_used(hub: Hub, tmp_path: Path) -> None:
    """After an interrupted fetch, a fetch of another checkpoint into the same directory starts from the beginning."""
    hub.fails_after = 2
    fetch(tmp_path / "name", repository="org/other")
    hub.fails_after, hub.written = None, []
    assert fetch(tmp_path / "name").exit_code == 0
    assert hub.written == list(CHECKPOINT)


def test_empty_directory_is_filled(hub: Hub, tmp_path: Path) -> None:
    """An existing empty directory and a missing one are equivalent."""
    assert fetch(tmp_path / "made").exit_code == 0
    (tmp_path / "name").mkdir()
    assert fetch(tmp_path / "name").output.endswith("fetched\n")
    assert set(CHECKPOINT) < set(files_in(tmp_path / "name"))


def test_other_content_is_neither_used_nor_overwritten(hub: Hub, tmp_path: Path) -> None:
    """Files of unknown origin, another model and another revision are rejected by name."""
    directory = tmp_path / "name"
    directory.mkdir()
    (directory / "config.json").write_text("half of something")
    rejected = fetch(directory)
    assert rejected.exit_code == 2
    expected = f"{directory}: contains files of unknown origin, not org/name; empty it, or pass another directory"
    assert expected in rejected.output
    fetch(tmp_path / "second", "--revision", "v1")
    assert "contains org/name@v1, not org/name;" in fetch(tmp_path / "second").output
    assert hub.requests == [("org/name", "v1")]


def test_only_one_of_two_concurrent_fetches_downloads(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas that share a volume start together: the second waits, then finds the directory."""
    downloading, resume = threading.Event(), threading.Event()

    def blocked_download(*args: Any, **options: Any) -> str:
        downloading.set()
        assert resume.wait(30)
        return hub.snapshot_download(*args, **options)

    monkeypatch.setattr("huggingface_hub.snapshot_download", blocked_download)
    from llama2_server.engine.checkpoint.hub import download_to

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(download_to, tmp_path / "name", "org/name")
        assert downloading.wait(30)
        second = pool.submit(download_to, tmp_path / "name", "org/name")
        resume.set()
        assert (first.result(30), second.result(30)) == (True, False)
    assert len(hub.requests) == 1


def test_invalid_hub_id_is_rejected(hub: Hub, tmp_path: Path) -> None:
    """Only ids of the form org/name reach the Hub."""
    rejected = fetch(tmp_path / "name", repository="./here")
    assert (rejected.exit_code, hub.requests) == (2, [])
    assert "./here: not an org/name on the Hugging Face Hub" in rejected.output


def test_unknown_revision_is_named(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names a misspelt revision."""

    def reject(*_: Any, **__: Any) -> str:
        response: Any = SimpleNamespace(headers={}, request=None)
        raise hub_errors.RevisionNotFoundError("404", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", reject)
    rejected = fetch(tmp_path / "name", "--revision", "v9")
    assert "org/name: has no revision v9 on the Hugging Face Hub" in rejected.output


def test_directory_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    """The error is one line with the directory and the reason of the operating system."""
    (tmp_path / "file").write_text("")
    rejected = fetch(tmp_path / "file" / "name")
    assert rejected.exit_code == 2
    assert f"{tmp_path / 'file' / 'name'}: cannot be written: " in rejected.output
    assert rejected.output.count("\n") == 1


BLOCKED = """
import sys, threading
import huggingface_hub
def block(*_, **__):
    print("torch" in sys.modules, flush=True)
    threading.Event().wait()
huggingface_hub.snapshot_download = block
sys.argv[1:] = ["weights", "fetch", "org/name", "--to", sys.argv[1]]
from llama2_server.__main__ import main
main()
"""


def test_sigterm_ends_a_fetch_without_torch(tmp_path: Path) -> None:
    """SIGTERM ends the fetch even as the first process of a container, and the fetch imports no torch."""
    command = [sys.executable, "-c", BLOCKED, str(tmp_path / "name")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "False\n"
        process.terminate()
        assert process.wait(30) == 143
    assert not (tmp_path / "name").exists()
