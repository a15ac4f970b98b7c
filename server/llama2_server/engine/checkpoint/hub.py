"""Where the weights come from: a directory, or the Hugging Face Hub."""

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
    "generation_config.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
# Stands in a directory that was fetched whole, and says from where.
SOURCE_FILE = "fetched-from.txt"


def fetch_checkpoint(weights: str) -> Path:
    """The directory of a checkpoint, given that directory or an `org/name` on the Hub, which is downloaded once.

    The library takes its token from the environment (HF_TOKEN) and shows its own progress. Raises WeightsError, with
    what to do about it, where there is no such directory or the Hub does not hand the checkpoint out.
    """
    directory = Path(weights).expanduser()
    if weights and directory.is_dir():
        return directory
    if not HUB_ID.fullmatch(weights):
        raise WeightsError(f"{weights}: no such directory, and not an org/name on the Hugging Face Hub either")
    return _download(weights)


def download_to(directory: Path, repository: str, revision: str | None = None) -> bool:
    """Download an `org/name` of the Hub into a directory that is there whole or not at all; False if it was there.

    Until all of it has come it lies beside the directory, where a fetch that was cut off goes on. Of several that fetch
    the same at once one does, and the others wait for it. Raises WeightsError as `fetch_checkpoint` does, and for a
    directory that holds anything else.
    """
    if not HUB_ID.fullmatch(repository):
        raise WeightsError(f"{repository}: not an org/name on the Hugging Face Hub")
    source = repository if revision is None else f"{repository}@{revision}"
    directory = directory.expanduser().absolute()
    try:
        with _download_lock(directory):
            if _is_complete(directory, source):
                return False
            # Named for its source: leftovers of another checkpoint never get in.
            partial = directory.with_name(f".{directory.name}.{source.replace('/', '--')}.partial")
            _download(repository, revision=revision, local_dir=partial)
            (partial / SOURCE_FILE).write_text(f"{source}\n", encoding="utf-8")
            os.sync()  # else a power failure could keep the name and lose the bytes
            partial.rename(directory)
    except OSError as error:
        raise WeightsError(f"{directory}: cannot be fetched into: {error.strerror or error}") from error
    return True


@contextmanager
def _download_lock(directory: Path) -> Iterator[None]:
    """Wait for other processes that fetch into the same directory; the system lets go of the lock of a dead one."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f".{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_complete(directory: Path, source: str) -> bool:
    """Whether the directory was fetched whole from the source; one that is empty or not there was not."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    origin = directory / SOURCE_FILE
    found = origin.read_text(encoding="utf-8").strip() if origin.is_file() else "something else"
    if found != source:
        raise WeightsError(f"{directory}: holds {found}, not {source}; empty it, or fetch into another directory")
    return True


def _download(repository: str, *, revision: str | None = None, local_dir: Path | None = None) -> Path:
    from huggingface_hub import snapshot_download  # a server that starts from a directory does without
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(
            snapshot_download(repository, revision=revision, local_dir=local_dir, allow_patterns=list(ALLOW_PATTERNS))
        )
    except GatedRepoError as error:
        raise WeightsError(
            f"{repository}: gated on the Hugging Face Hub; accept its licence there and set HF_TOKEN, "
            "or download it on another machine and pass the directory"
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"{repository}: neither a directory here nor a model on the Hugging Face Hub that this HF_TOKEN may see; "
            "check the name, set HF_TOKEN after accepting the licence, or pass a directory"
        ) from error
    except RevisionNotFoundError as error:
        raise WeightsError(
            f"{repository}: the Hugging Face Hub has no revision {revision} of it; "
            "give a branch, a tag or a commit, or pass a directory"
        ) from error
    # What else the library raises depends on its version and transport (HTTP errors, time-outs, full disks, its cache):
    # this is the one seam where all of it becomes a line for the operator.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise WeightsError(
            f"{repository}: could not be fetched from the Hugging Face Hub; check the network and HF_TOKEN, "
            f"or download it on another machine and pass the directory ({type(error).__name__}: {reason})"
        ) from error
