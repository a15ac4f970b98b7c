"""Compare downloaded files with the digests that the Hub lists."""

import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llama2_server.engine.errors import WeightsError

READERS = 2
_BLOCK_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def verify_download(repository: str, directory: Path, digests: Mapping[str, str]) -> None:
    """Check each file; delete those with another content, so that the next download fetches them again.

    Args:
        repository: the `org/name`, for the error message.
        directory: where the files are.
        digests: by file name, the SHA-256 of a file in Git LFS, or the id of another file's Git object.

    Raises:
        WeightsError: a file has another digest.
    """
    with ThreadPoolExecutor(READERS, "digest") as pool:
        found = pool.map(lambda item: _matches(directory / item[0], item[1]), digests.items())
        wrong = [name for name, matches in zip(digests, found, strict=True) if not matches]
    for name in wrong:
        (directory / name).unlink()
    if wrong:
        raise WeightsError(
            f"{repository}: after the download, {', '.join(wrong)} has another digest than on the Hugging Face Hub; "
            "fetch the checkpoint again, which keeps the other files"
        )


def _matches(path: Path, digest: str) -> bool:
    if _SHA256.fullmatch(digest):
        found = hashlib.sha256()
    else:
        found = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            found.update(block)
    return found.hexdigest() == digest
