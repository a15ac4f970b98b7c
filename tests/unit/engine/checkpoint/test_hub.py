"""Directories, Hub ids and errors of the Hugging Face Hub."""

from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors as hub_errors

from llama2_server.engine.checkpoint.hub.download import fetch_checkpoint
from llama2_server.engine.errors import WeightsError


def test_a_directory_is_returned_unchanged(tmp_path: Path) -> None:
    """An existing directory is used directly."""
    assert fetch_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("weights", ["/no/such/directory", "./nowhere", "nowhere", "", "a/b/c", "org/na me"])
def test_neither_directory_nor_hub_id_is_rejected(weights: str) -> None:
    """Only org/name is looked up on the Hub."""
    expected = "not a directory and not an org/name on the Hugging Face Hub; pass a checkpoint's directory or its Hub"
    with pytest.raises(WeightsError, match=f"^{weights}: {expected} id$"):
        fetch_checkpoint(weights)


@pytest.mark.parametrize(("name", "kind"), [("a.gguf", "a GGUF file of llama.cpp"), ("model.safetensors", "a file")])
def test_a_file_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    """A file is not looked up on the Hub, although its path can have the form of a Hub id."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=f"^models/{name}: {kind}; pass the directory of a Hugging Face checkpoint"):
        fetch_checkpoint(f"models/{name}")


RESPONSE: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.GatedRepoError("gated", response=RESPONSE), "accept its license there and set HF_TOKEN"),
        (hub_errors.RepositoryNotFoundError("404", response=RESPONSE), "neither a directory nor a model"),
        (
            hub_errors.HfHubHTTPError("503\nService Unavailable", response=RESPONSE),
            r"failed \(HfHubHTTPError: 503 Service .*\); check the network and HF_TOKEN",
        ),
        (
            hub_errors.LocalEntryNotFoundError("offline"),
            r"failed \(LocalEntryNotFoundError.*\); check the network and HF_TOKEN, ",
        ),
        (OSError("no space left on device"), r"failed \(OSError: no space left on device\); "),
    ],
)
def test_errors_of_the_hub_come_with_a_remedy(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    """One line names the repository and how to fix the error."""

    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(WeightsError, match=f"^org/name: .*{message}") as rejection:
        fetch_checkpoint("org/name")
    assert "\n" not in str(rejection.value)
    assert "pass" in str(rejection.value)


def test_only_needed_files_are_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pickles, weights of other frameworks and documents are not downloaded."""
    calls: list[Any] = []

    def download(repository: str, *, allow_patterns: list[str], **_: Any) -> str:
        calls.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert fetch_checkpoint("org/name") == tmp_path
    ((repository, patterns),) = calls
    assert repository == "org/name"
    offered = ["model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "tokenizer.json"]
    offered += ["chat_template.jinja", "pytorch_model.bin", "README.md"]
    assert [name for name in offered if any(fnmatch(name, pattern) for pattern in patterns)] == offered[:5]
