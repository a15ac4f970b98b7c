"""Find a checkpoint in a directory, or download it from the Hugging Face Hub."""

import fcntl
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama2_server.engine.checkpoint.hub.errors import named_hub_errors
from llama2_server.engine.checkpoint.hub.plan import ALLOW_PATTERNS, DIRECTORY_REMEDY, Announce, plan_download
from llama2_server.engine.checkpoint.hub.verify import verify_download
from llama2_server.engine.errors import WeightsError

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
POLL_SECONDS = 1.0
# Names the source of a complete download, inside its directory.
SOURCE_FILE = "fetched-from.txt"
# The Hub library gives each process its own name for an unfinished file.
UNFINISHED_FILES = ".cache/huggingface/download/**/*." + "[0-9a-f]" * 8 + ".incomplete"


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


def download_to(
    directory: Path, repository: str, revision: str | None = None, announce: Announce = logger.info
) -> bool:
    """Download an `org/name` of the Hub to a directory, which appears only when the download is complete.

    Every file has the digest that the Hub lists. Return False if the directory already contains this download. A
    partial download is stored next to the directory, and the next call resumes it. If several processes download to one
    directory, one downloads and the others wait.

    Raises:
        WeightsError: as in `fetch_checkpoint`, the disk has too little space, a file arrived with another digest, or
            the directory contains other files.
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
            _remove_unfinished_files(partial)
            plan = plan_download(repository, revision, directory, partial)
            plan.check_space(DIRECTORY_REMEDY, announce)
            _download(repository, revision=plan.revision, local_dir=partial)
            verify_download(repository, partial, plan.digests)
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


def wait_for_download(
    directory: Path, repository: str, revision: str | None = None, announce: Announce = logger.info
) -> None:
    """Return when `download_to` of another process, which may run on another machine, has completed the directory.

    Raises:
        WeightsError: the directory contains other files, or is not readable.
    """
    source = repository if revision is None else f"{repository}@{revision}"
    directory = _expand_home(directory).absolute()
    waits = False
    try:
        while not _is_complete(directory, source):
            if not waits:
                announce(f"waiting for the download of {source} to {directory}")
            waits = True
            # A network file system reports no changes of other machines, so there is no event to wait for.
            time.sleep(POLL_SECONDS)
    except OSError as error:
        raise WeightsError(
            f"{directory}: cannot be read: {error.strerror or error}; mount the volume that the download writes to"
        ) from error


@contextmanager
def _download_lock(directory: Path) -> Iterator[None]:
    """Wait for other processes that download to the same directory; the system releases the lock of a dead process."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f".{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_unfinished_files(partial: Path) -> None:
    """Free the space of files that a killed process was downloading; the Hub library never continues them."""
    for path in partial.glob(UNFINISHED_FILES):
        path.unlink(missing_ok=True)


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
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """A progress bar on a terminal; in a log, a bar would break the lines."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": not sys.stderr.isatty()})  # type: ignore[no-untyped-call]

    patterns = list(ALLOW_PATTERNS)
    with named_hub_errors(repository, revision):
        return Path(
            snapshot_download(
                repository, revision=revision, local_dir=local_dir, allow_patterns=patterns, tqdm_class=Bar
            )
        )
