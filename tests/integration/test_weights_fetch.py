"""`llama2-server weights fetch`: a checkpoint of the Hub in a directory, whole or not at all."""

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

from llama2_server.cli.admin import admin

CHECKPOINT = {"config.json": "{}", "model.safetensors": "tensors", "tokenizer.model": "pieces"}


class Hub:
    """Stands in for the Hub: a download writes one file after the other, and breaks after `breaks_after` of them."""

    def __init__(self) -> None:
        self.breaks_after: int | None = None
        self.written: list[str] = []
        self.asked: list[tuple[str, str | None]] = []

    def snapshot_download(
        self, repository: str, *, revision: str | None, local_dir: Path, allow_patterns: list[str]
    ) -> str:
        self.asked.append((repository, revision))
        local_dir.mkdir(parents=True, exist_ok=True)
        for index, (name, content) in enumerate(CHECKPOINT.items()):
            if index == self.breaks_after:
                raise ConnectionError("reset by peer")
            if not (local_dir / name).exists():
                (local_dir / name).write_text(content)
                self.written.append(name)
        return str(local_dir)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub that `huggingface_hub` talks to in these tests."""
    stand_in = Hub()
    monkeypatch.setattr("huggingface_hub.snapshot_download", stand_in.snapshot_download)
    # click's runner calls in this process, whose own handler shall stay.
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return stand_in


def fetch(directory: Path, *more: str, repository: str = "org/name") -> Result:
    return CliRunner().invoke(admin, ["weights", "fetch", repository, "--to", str(directory), *more])


def files_in(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_fetches_once(hub: Hub, tmp_path: Path) -> None:
    """The first call downloads, the next one finds the directory there and asks the Hub nothing."""
    directory = tmp_path / "models" / "name"
    first, second = fetch(directory), fetch(directory)
    assert (first.exit_code, first.output) == (0, f"{directory}: fetched\n")
    assert (second.exit_code, second.output) == (0, f"{directory}: there already\n")
    assert hub.asked == [("org/name", None)]
    assert files_in(directory) == {**CHECKPOINT, "fetched-from.txt": "org/name\n"}


def test_a_fetch_that_was_cut_off_is_not_taken_for_whole_and_goes_on(hub: Hub, tmp_path: Path) -> None:
    """The directory is not there until all has come; the next fetch keeps what had come."""
    directory = tmp_path / "name"
    hub.breaks_after = 2
    cut_off = fetch(directory)
    assert cut_off.exit_code == 2
    assert "llama2-server: org/name: download from the Hugging Face Hub failed" in cut_off.output
    assert "reset by peer" in cut_off.output
    assert not directory.exists()
    hub.breaks_after = None
    assert fetch(directory).exit_code == 0
    assert hub.written == list(CHECKPOINT)  # nothing twice
    assert not list(tmp_path.glob(".*.partial"))


def test_leftovers_of_another_checkpoint_do_not_get_in(hub: Hub, tmp_path: Path) -> None:
    """A fetch that was cut off leaves nothing in a directory that is then fetched from elsewhere."""
    hub.breaks_after = 2
    fetch(tmp_path / "name", repository="org/other")
    hub.breaks_after, hub.written = None, []
    assert fetch(tmp_path / "name").exit_code == 0
    assert hub.written == list(CHECKPOINT)


def test_an_empty_directory_is_filled(hub: Hub, tmp_path: Path) -> None:
    """A directory that somebody made for it is as good as none."""
    assert fetch(tmp_path / "made").exit_code == 0
    (tmp_path / "name").mkdir()
    assert fetch(tmp_path / "name").output.endswith("fetched\n")
    assert set(CHECKPOINT) < set(files_in(tmp_path / "name"))


def test_what_was_not_fetched_here_is_neither_used_nor_overwritten(hub: Hub, tmp_path: Path) -> None:
    """Files of unknown origin, another model and another revision are refused by name."""
    directory = tmp_path / "name"
    directory.mkdir()
    (directory / "config.json").write_text("half of something")
    refused = fetch(directory)
    assert refused.exit_code == 2
    expected = f"{directory}: contains files of unknown origin, not org/name; empty it, or pass another directory"
    assert expected in refused.output
    fetch(tmp_path / "second", "--revision", "v1")
    assert "contains org/name@v1, not org/name;" in fetch(tmp_path / "second").output
    assert hub.asked == [("org/name", "v1")]


def test_of_two_at_once_one_downloads(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas that share a volume start together: the second waits, then finds it there."""
    inside, go_on = threading.Event(), threading.Event()

    def held(*args: Any, **options: Any) -> str:
        inside.set()
        assert go_on.wait(30)
        return hub.snapshot_download(*args, **options)

    monkeypatch.setattr("huggingface_hub.snapshot_download", held)
    from llama2_server.engine.checkpoint.hub import download_to

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(download_to, tmp_path / "name", "org/name")
        assert inside.wait(30)
        second = pool.submit(download_to, tmp_path / "name", "org/name")
        go_on.set()
        assert (first.result(30), second.result(30)) == (True, False)
    assert len(hub.asked) == 1


def test_refuses_what_is_no_hub_id(hub: Hub, tmp_path: Path) -> None:
    """Only org/name is asked for."""
    refused = fetch(tmp_path / "name", repository="./here")
    assert (refused.exit_code, hub.asked) == (2, [])
    assert "./here: not an org/name on the Hugging Face Hub" in refused.output


def test_says_that_a_revision_is_unknown(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped revision is named."""

    def refuse(*_: Any, **__: Any) -> str:
        answer: Any = SimpleNamespace(headers={}, request=None)
        raise hub_errors.RevisionNotFoundError("404", response=answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    refused = fetch(tmp_path / "name", "--revision", "v9")
    assert "org/name: has no revision v9 on the Hugging Face Hub" in refused.output


def test_a_place_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    """One line with the directory and the system's reason."""
    (tmp_path / "file").write_text("")
    refused = fetch(tmp_path / "file" / "name")
    assert refused.exit_code == 2
    assert f"{tmp_path / 'file' / 'name'}: cannot be written: " in refused.output
    assert refused.output.count("\n") == 1


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


def test_sigterm_ends_it_and_torch_is_not_loaded(tmp_path: Path) -> None:
    """The first process of a container ends at SIGTERM only if it has a handler; and fetching needs no torch."""
    command = [sys.executable, "-c", BLOCKED, str(tmp_path / "name")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "False\n"
        process.terminate()
        assert process.wait(30) == 143
    assert not (tmp_path / "name").exists()
