"""Find a checkpoint in a directory, or download it from the Hugging Face Hub."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama2_server.engine.errors import WeightsError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
ALLOW_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "adapter_config.json",
    "quantize_config.json",
    "quant_config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "added_tokens.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
# Names the source of a complete download, inside its directory.
SOURCE_FILE = "fetched-from.txt"


def fetch_checkpoint(weights: str) -> Path:
    """Return the directory of a checkpoint, given that directory or an `org/name` on the Hub.

    A checkpoint on the Hub is downloaded once. The Hub library reads its token from the environment (HF_TOKEN) and
    shows its own progress.

    Raises:
        WeightsError: the directory does not exist, or the Hub does not provide the checkpoint.
    """
    return find_checkpoint(weights) or _download(weights)


def find_checkpoint(weights: str) -> Path | None:
    """Return the directory of a checkpoint on this machine, or None for an `org/name` on the Hub.

    Raises:
        WeightsError: it is neither.
    """
    directory = _expand_home(weights)
    if weights and directory.is_dir():
        return directory
    if directory.is_file():
        kind = "a GGUF file of llama.cpp" if directory.suffix == ".gguf" else "a file"
        raise WeightsError(f"{weights}: {kind}; pass the directory of a Hugging Face checkpoint with safetensors files")
    if not HUB_ID.fullmatch(weights):
        raise WeightsError(
            f"{weights}: not a directory and not an org/name on the Hugging Face Hub; pass a checkpoint's directory "
            "or its Hub id"
        )
    return None


def download_to(directory: Path, repository: str, revision: str | None = None) -> bool:
    """Download an `org/name` of the Hub to a directory, which appears only when the download is complete.

    Return False if the directory already contains this download. A partial download is stored next to the directory,
    and the next call resumes it. If several processes download to one directory, one downloads and the others wait.

    Raises:
        WeightsError: as in `fetch_checkpoint`, or the directory contains other files.
    """
    if not HUB_ID.fullmatch(repository):
        raise WeightsError(
            f"{repository}: not an org/name on the Hugging Face Hub; pass a Hub id such as "
            "meta-llama/Llama-2-7b-chat-hf"
        )
    source = repository if revision is None else f"{repository}@{revision}"
    directory = _expand_home(directory).absolute()
    try:
        with _download_lock(directory):
            if _is_complete(directory, source):
                return False
            # The source is part of the name, so that files of another checkpoint never get in.
            partial = directory.with_name(f".{directory.name}.{source.replace('/', '--')}.partial")
            _download(repository, revision=revision, local_dir=partial)
            (partial / SOURCE_FILE).write_text(f"{source}\n", encoding="utf-8")
            os.sync()  # otherwise a power failure could keep the directory and lose its content
            partial.rename(directory)
    except OSError as error:
        raise WeightsError(
            f"{directory}: cannot be written: {error.strerror or error}; make it writable, or pass another directory"
        ) from error
    return True


def _expand_home(path: Path | str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # an unknown account, or no home directory
        raise WeightsError(f"{path}: the home directory is unknown; pass a path without ~") from error


@contextmanager
def _download_lock(directory: Path) -> Iterator[None]:
    """Wait for other processes that download to the same directory; the system releases the lock of a dead process."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f".{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_complete(directory: Path, source: str) -> bool:
    """Return whether the directory is a complete download of the source; raise WeightsError for any other content."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    source_file = directory / SOURCE_FILE
    found = source_file.read_text(encoding="utf-8").strip() if source_file.is_file() else "files of unknown origin"
    if found != source:
        raise WeightsError(f"{directory}: contains {found}, not {source}; empty it, or pass another directory")
    return True


def _download(repository: str, *, revision: str | None = None, local_dir: Path | None = None) -> Path:
    from huggingface_hub import snapshot_download  # not needed to start from a directory
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(
            snapshot_download(repository, revision=revision, local_dir=local_dir, allow_patterns=list(ALLOW_PATTERNS))
        )
    except GatedRepoError as error:
        raise WeightsError(
            f"{repository}: gated on the Hugging Face Hub; accept its license there and set HF_TOKEN, "
            "or download it on another machine and pass the directory"
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"{repository}: neither a directory nor a model on the Hugging Face Hub that this HF_TOKEN can read; "
            "check the name, accept the license and set HF_TOKEN, or pass a directory"
        ) from error
    except RevisionNotFoundError as error:
        raise WeightsError(
            f"{repository}: has no revision {revision} on the Hugging Face Hub; "
            "pass a branch, a tag or a commit, or pass a directory"
        ) from error
    # The library's other exceptions depend on its version and transport: HTTP errors, timeouts, full disks, its cache.
    # They are all mapped here to one line for the operator.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise WeightsError(
            f"{repository}: download from the Hugging Face Hub failed ({type(error).__name__}: {reason}); "
            "check the network and HF_TOKEN, or download it on another machine and pass the directory"
        ) from error
