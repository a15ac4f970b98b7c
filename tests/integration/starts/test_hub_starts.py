"""Starts with weights on the Hugging Face Hub: errors before the download, and the download."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.starts.test_wrong_starts import last_line
from tests.support.processes import free_port, server
from tests.support.servers.hub_server import HubServer, Repository, running_hub
from tools.make_checkpoint import Shape, make_checkpoint

PETABYTE = 10**15
FLAGS = ["--listen", "127.0.0.1:0", "--device", "cpu", "--weights", "org/name"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A local Hub that server processes use in place of the real one; org/name is a made checkpoint."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", Shape(context=1024))
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with running_hub() as running:
        running.repositories["org/name"] = Repository(files | {"README.md": b"text"})
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield running


def test_too_little_space_is_reported_before_torch(hub: HubServer, tmp_path: Path) -> None:
    """One line has the size, the free space and the remedy, and no file is downloaded."""
    hub.repositories["org/name"].sizes["model.safetensors"] = PETABYTE
    line = last_line(tmp_path, FLAGS)
    cache = tmp_path / "home" / "hub"
    assert line.startswith(f"--weights: org/name: the download needs 1000000.0 GB, but {cache} has only ")
    assert line.endswith(" GB free; free space, or set HF_HOME to a directory on a larger disk")
    assert hub.downloads == []


def test_unreadable_repositories_are_reported_before_torch(hub: HubServer, tmp_path: Path) -> None:
    """The license of a gated model, whose metadata anyone can read, and the name of a missing one."""
    hub.repositories["org/name"].gated = True
    assert last_line(tmp_path, FLAGS).startswith("--weights: org/name: gated on the Hugging Face Hub; accept its")
    del hub.repositories["org/name"]
    assert last_line(tmp_path, FLAGS).startswith("--weights: org/name: neither a directory nor a model on the Hugging")


def test_an_unreachable_hub_is_reported_before_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection, without an earlier download."""
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    line = last_line(tmp_path, FLAGS)
    assert line.startswith("--weights: org/name: download from the Hugging Face Hub failed (ConnectError: ")
    assert line.endswith("; check the network and HF_TOKEN, or download it on another machine and pass the directory")


def test_a_download_is_served(hub: HubServer, tmp_path: Path) -> None:
    """The log states the size of the download, and has no record for each request to the Hub."""
    with server(tmp_path, *FLAGS[2:]):
        assert "model.safetensors" in hub.downloads
        assert "README.md" not in hub.downloads
    log = (tmp_path / "server.log").read_text()
    assert f"downloading org/name to {tmp_path / 'home' / 'hub'}: " in log
    assert "HTTP" not in log
