"""The size of a download and the free space for it, before anything is downloaded."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from llama2_server.engine.checkpoint.hub.errors import named_hub_errors
from llama2_server.engine.errors import WeightsError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

Announce = Callable[[str], object]
"""Called with one line about a download before it begins."""

logger = logging.getLogger(__name__)

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
TIMEOUT_SECONDS = 10.0
CACHE_REMEDY = "free space, or set HF_HOME to a directory on a larger disk"
DIRECTORY_REMEDY = "free space, or pass another directory"


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """The files of a checkpoint that are not on this machine yet."""

    repository: str
    directory: Path
    """Where they will be."""
    files: int
    size_bytes: int
    revision: str | None = None
    """The commit, which does not change during the download."""
    digests: dict[str, str] = field(default_factory=dict)
    """The digest of each file, as the Hub lists it: the SHA-256 in Git LFS, otherwise the id of a Git object."""

    def check_space(self, remedy: str, announce: Announce) -> None:
        """Check the disk, and announce the size of the download if there is one.

        Raises:
            WeightsError: the files need more space than is free.
        """
        if not self.files:
            return
        free_bytes = shutil.disk_usage(_existing(self.directory)).free
        size, free = _size(self.size_bytes), _size(free_bytes)
        if self.size_bytes > free_bytes:
            raise WeightsError(
                f"{self.repository}: the download needs {size}, but {self.directory} has only {free} free; {remedy}"
            )
        announce(f"downloading {self.repository} to {self.directory}: {self.files} files, {size}; {free} are free")


def cached_checkpoint(repository: str) -> Path | None:
    """Return the directory of a checkpoint that is complete in the Hub library's cache; None if it needs a download.

    The disk has the space for the download. If the Hub does not answer, the checkpoint of an earlier download is used.

    Raises:
        WeightsError: the disk has too little space, or the Hub does not provide the checkpoint.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with named_hub_errors(repository):
        try:
            info = _model_info(repository)
        except (GatedRepoError, RepositoryNotFoundError):
            raise
        except Exception:  # no network, offline mode or an error of the Hub; the class depends on the transport
            cached = _cached(repository, None)
            if cached is None:
                raise
            return cached
        blobs = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "blobs"
        missing = [file for file in _needed_files(info) if not (blobs / _etag(file)).exists()]
        _plan(repository, Path(HF_HUB_CACHE), missing).check_space(CACHE_REMEDY, logger.info)
        return _cached(repository, info.sha)


def _cached(repository: str, revision: str | None) -> Path | None:
    """Return the directory of a complete download in the cache, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = list(ALLOW_PATTERNS)
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def plan_download(repository: str, revision: str | None, directory: Path, unfinished: Path) -> DownloadPlan:
    """Return what a download to a directory needs; complete files of an interrupted download are in `unfinished`.

    Raises:
        WeightsError: the Hub does not provide the checkpoint.
    """
    with named_hub_errors(repository, revision):
        info = _model_info(repository, revision)
    needed = _needed_files(info)
    missing = [file for file in needed if not (unfinished / file.rfilename).is_file()]
    digests = {file.rfilename: _etag(file) for file in needed}
    return replace(_plan(repository, directory, missing), revision=info.sha or revision, digests=digests)


def _plan(repository: str, directory: Path, missing: "list[RepoSibling]") -> DownloadPlan:
    return DownloadPlan(repository, directory, len(missing), sum(file.size or 0 for file in missing))


def _model_info(repository: str, revision: str | None = None) -> "ModelInfo":
    """Return the metadata of the files, if this account can read them."""
    from huggingface_hub import HfApi

    api = HfApi()
    info = api.model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
    if info.gated:  # anyone can read the metadata
        api.auth_check(repository)
    return info


def _needed_files(info: "ModelInfo") -> "list[RepoSibling]":
    files = info.siblings or []
    return [file for file in files if any(fnmatch(file.rfilename, pattern) for pattern in ALLOW_PATTERNS)]


def _etag(file: "RepoSibling") -> str:
    """Return the name of the file's content in the cache."""
    return file.lfs.sha256 if file.lfs is not None else file.blob_id or file.rfilename


def _existing(directory: Path) -> Path:
    """Return the directory or its closest parent that exists."""
    return next(path for path in (directory, *directory.parents) if path.exists())


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"
