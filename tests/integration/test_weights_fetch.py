"""`llama2-server weights fetch`: a directory with the complete checkpoint, or no directory."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.support.processes import environment, free_port
from tests.support.servers.hub_server import COMMIT, HubServer, Repository, running_hub

from llama2_server.card import ModelCard
from llama2_server.cli.main import program
from llama2_server.config.settings import Settings
from llama2_server.configuration_error import ConfigurationError
from llama2_server.engine.checkpoint.hub.download import download_to, fetch_checkpoint
from llama2_server.engine.checkpoint.hub.plan import cached_checkpoint
from llama2_server.engine.errors import WeightsError
from llama2_server.lifecycle.checks.checkpoint import check_checkpoint

CHECKPOINT = {"config.json": b"{}", "model.safetensors": b"tensors", "tokenizer.model": b"pieces"}
OTHERS = {"README.md": b"text", "pytorch_model.bin": b"pickle"}
PETABYTE = 10**15


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A local Hub in place of the real one, with the repositories org/name and org/other."""
    with running_hub() as server:
        server.repositories = {name: Repository(CHECKPOINT | OTHERS) for name in ("org/name", "org/other")}
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        # click's runner calls the command in this process, whose signal handlers must not change.
        monkeypatch.setattr("signal.signal", lambda *_: None)
        yield server


def fetch(directory: Path, *more: str, repository: str = "org/name") -> Result:
    return CliRunner().invoke(program, ["weights", "fetch", repository, "--to", str(directory), *more])


def files_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_fetches_once(hub: HubServer, tmp_path: Path) -> None:
    """The first call prints the size and downloads the checkpoint; the next one does not call the Hub."""
    directory = tmp_path / "models" / "name"
    first = fetch(directory)
    announced, done = first.output.splitlines()
    assert announced.startswith(f"downloading org/name to {directory}: 3 files, 0.0 MB; ")
    assert announced.endswith(" GB are free")
    assert (first.exit_code, done) == (0, f"{directory}: fetched")
    assert files_in(directory) == {**CHECKPOINT, "fetched-from.txt": b"org/name\n"}
    hub.requests.clear()
    second = fetch(directory)
    assert (second.exit_code, second.output) == (0, f"{directory}: already present\n")
    assert hub.requests == []


def test_too_little_space_is_reported_before_the_download(hub: HubServer, tmp_path: Path) -> None:
    """One line has the size, the free space and the remedy; no file is requested."""
    hub.repositories["org/name"].sizes["model.safetensors"] = PETABYTE
    rejected = fetch(tmp_path / "name")
    assert rejected.exit_code == 2
    (line,) = rejected.output.splitlines()
    start = f"llama2-server: org/name: the download needs 1000000.0 GB, but {tmp_path / 'name'} has only "
    assert line.startswith(start)
    assert line.endswith(" GB free; free space, or pass another directory")
    assert hub.requests == ["GET /api/models/org/name"]
    assert not (tmp_path / "name").exists()


def test_interrupted_fetch_leaves_no_directory_and_is_resumed(hub: HubServer, tmp_path: Path) -> None:
    """The directory does not exist until the fetch is complete; the next fetch keeps the files that arrived."""
    directory = tmp_path / "name"
    hub.repositories["org/name"].fails_after = 2
    interrupted = fetch(directory)
    assert interrupted.exit_code == 2
    assert "llama2-server: org/name: download from the Hugging Face Hub failed" in interrupted.output
    assert not directory.exists()
    hub.repositories["org/name"].fails_after = None
    resumed = fetch(directory)
    assert resumed.exit_code == 0
    assert ": 1 files, " in resumed.output
    assert sorted(hub.downloads) == sorted(CHECKPOINT)  # no file was fetched twice
    assert not list(tmp_path.glob(".*.partial"))


def test_space_of_a_killed_fetch_is_freed(hub: HubServer, tmp_path: Path) -> None:
    """A killed process leaves a temporary file, which the Hub library never continues."""
    folder = tmp_path / ".name.org--name.partial" / ".cache" / "huggingface" / "download"
    folder.mkdir(parents=True)
    (folder / f"Ab-_{'0' * 64}.0123abcd.incomplete").write_bytes(b"half of a file")
    hub.repositories["org/name"].fails_after = 0
    assert fetch(tmp_path / "name").exit_code == 2
    assert not list(folder.glob("*.incomplete"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_fetched_again(hub: HubServer, tmp_path: Path, name: str) -> None:
    """A file with another digest than the Hub's fails the fetch; the next fetch replaces it and keeps the others."""
    directory = tmp_path / "name"
    hub.repositories["org/name"].damaged = {name}
    rejected = fetch(directory)
    assert rejected.exit_code == 2
    assert f"org/name: after the download, {name} has another digest than on the Hugging Face Hub;" in rejected.output
    assert not directory.exists()
    hub.repositories["org/name"].damaged = set()
    hub.downloads.clear()
    assert fetch(directory).exit_code == 0
    assert hub.downloads == [name]
    assert files_in(directory) == {**CHECKPOINT, "fetched-from.txt": b"org/name\n"}


def test_replicas_wait_for_one_fetch(hub: HubServer, tmp_path: Path) -> None:
    """`weights wait` ends with the fetch of another process, without the Hub, and rejects another revision."""
    directory = tmp_path / "name"
    hub.before_download.clear()
    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(download_to, directory, "org/name")
        assert hub.downloading.wait(30)
        call = [sys.executable, "-m", "llama2_server", "weights", "wait", "org/name", "--in", str(directory)]
        variables = environment(HF_HUB_OFFLINE="1")
        with subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env=variables) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == f"waiting for the download of org/name to {directory}\n"
            assert process.poll() is None
            hub.before_download.set()
            assert fetching.result(30)
            assert process.communicate(timeout=30)[0] == f"{directory}: complete\n"
        assert process.returncode == 0
    other = [*call[3:], "--revision", COMMIT]
    rejected = CliRunner().invoke(program, other)
    assert (rejected.exit_code, "contains org/name, not org/name@" in rejected.output) == (2, True)


def test_partial_files_of_another_checkpoint_are_not_used(hub: HubServer, tmp_path: Path) -> None:
    """After an interrupted fetch, a fetch of another checkpoint into the same directory starts from the beginning."""
    hub.repositories["org/other"].fails_after = 2
    fetch(tmp_path / "name", repository="org/other")
    hub.downloads.clear()
    assert fetch(tmp_path / "name").exit_code == 0
    assert sorted(hub.downloads) == sorted(CHECKPOINT)


def test_empty_directory_is_filled(hub: HubServer, tmp_path: Path) -> None:
    """An existing empty directory and a missing one are equivalent."""
    assert fetch(tmp_path / "made").exit_code == 0
    (tmp_path / "name").mkdir()
    assert fetch(tmp_path / "name").output.endswith(": fetched\n")
    assert set(CHECKPOINT) < set(files_in(tmp_path / "name"))


def test_other_content_is_neither_used_nor_overwritten(hub: HubServer, tmp_path: Path) -> None:
    """Files of unknown origin, another model and another revision are rejected by name."""
    directory = tmp_path / "name"
    directory.mkdir()
    (directory / "config.json").write_text("half of something")
    rejected = fetch(directory)
    assert rejected.exit_code == 2
    expected = f"{directory}: contains files of unknown origin, not org/name; empty it, or pass another directory"
    assert expected in rejected.output
    fetch(tmp_path / "second", "--revision", COMMIT)
    hub.requests.clear()
    assert f"contains org/name@{COMMIT}, not org/name;" in fetch(tmp_path / "second").output
    assert hub.requests == []


def test_only_one_of_two_concurrent_fetches_downloads(hub: HubServer, tmp_path: Path) -> None:
    """Replicas that share a volume start together: the second waits, then finds the directory."""
    hub.before_download.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(download_to, tmp_path / "name", "org/name")
        assert hub.downloading.wait(30)
        second = pool.submit(download_to, tmp_path / "name", "org/name")
        hub.before_download.set()
        assert (first.result(30), second.result(30)) == (True, False)
    assert sorted(hub.downloads) == sorted(CHECKPOINT)


def test_cached_weights_need_no_space_and_no_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint in the cache of the Hub library is found, also under a new commit, and while the Hub is away."""
    assert cached_checkpoint("org/name") is None
    directory = fetch_checkpoint("org/name")
    hub.repositories["org/name"].sizes["model.safetensors"] = PETABYTE
    assert cached_checkpoint("org/name") == directory
    hub.repositories["org/name"].commit = "b" * 40
    assert cached_checkpoint("org/name") is None  # its files are in the cache and need no space
    assert fetch_checkpoint("org/name") != directory
    assert sorted(hub.downloads) == sorted(CHECKPOINT)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert cached_checkpoint("org/name") is not None
    with pytest.raises(WeightsError, match="org/other: download from the Hugging Face Hub failed"):
        cached_checkpoint("org/other")


def test_cached_weights_are_checked_like_a_directory(hub: HubServer, demo_card: ModelCard) -> None:
    """An unsuitable checkpoint in the cache is rejected before torch is imported."""
    settings = Settings.model_validate({"weights": "org/name"})
    check_checkpoint(settings, demo_card)  # it must be downloaded first
    fetch_checkpoint("org/name")
    with pytest.raises(ConfigurationError, match=r"^--weights: .*config\.json: architectures is None"):
        check_checkpoint(settings, demo_card)


def test_invalid_hub_id_is_rejected(hub: HubServer, tmp_path: Path) -> None:
    """Only ids of the form org/name reach the Hub."""
    rejected = fetch(tmp_path / "name", repository="./here")
    assert (rejected.exit_code, hub.requests) == (2, [])
    assert "./here: not an org/name on the Hugging Face Hub" in rejected.output


def test_unknown_revision_is_named(hub: HubServer, tmp_path: Path) -> None:
    """The error names a misspelt revision."""
    rejected = fetch(tmp_path / "name", "--revision", "v9")
    assert "org/name: has no revision v9 on the Hugging Face Hub" in rejected.output
    assert hub.requests == ["GET /api/models/org/name/revision/v9"]


def test_directory_that_cannot_be_written_is_named(hub: HubServer, tmp_path: Path) -> None:
    """The error is one line with the directory and the reason of the operating system."""
    (tmp_path / "file").write_text("")
    rejected = fetch(tmp_path / "file" / "name")
    assert rejected.exit_code == 2
    assert f"{tmp_path / 'file' / 'name'}: cannot be written: " in rejected.output
    assert rejected.output.count("\n") == 1


BLOCKED = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("imports torch", flush=True)
sys.meta_path.insert(0, Finder())
from llama2_server.__main__ import main
main()
"""


def test_sigterm_ends_a_fetch_without_torch(hub: HubServer, tmp_path: Path) -> None:
    """SIGTERM ends the fetch even as the first process of a container, and the fetch imports no torch."""
    hub.before_download.clear()
    call = [sys.executable, "-c", BLOCKED, "weights", "fetch", "org/name", "--to", str(tmp_path / "name")]
    variables = environment(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    pipe = subprocess.PIPE
    with subprocess.Popen(call, stdout=pipe, stderr=pipe, text=True, env=variables) as process:
        assert hub.downloading.wait(30)
        process.terminate()
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    (announced,) = output.splitlines()
    assert announced.startswith("downloading org/name to ")
    assert errors == "llama2-server: stopped by SIGTERM\n"
    assert not (tmp_path / "name").exists()
