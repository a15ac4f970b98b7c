"""Verify the files of a checkpoint against the digests in its optional file SHA256SUMS, as `sha256sum` writes it."""

import hashlib
import logging
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llama2_server.engine.errors import WeightsError

logger = logging.getLogger(__name__)

DIGEST_FILE = "SHA256SUMS"
READERS = 2
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\0]+)")


def verify_digests(directory: Path, weight_files: Iterable[Path]) -> None:
    """Check each file that SHA256SUMS lists; do nothing without that file. It must list every file of the weights.

    Raises:
        WeightsError: a digest differs, or the list is unreadable or incomplete.
    """
    path = directory / DIGEST_FILE
    if not path.is_file():
        return
    digests = _read(path)
    for file in sorted(weight_files):
        if file.name not in digests:
            raise WeightsError(f"{path}: does not list {file.name}; write it again with sha256sum")
    with ThreadPoolExecutor(READERS, "digest") as pool:
        for name, found in zip(digests, pool.map(_sha256, [directory / name for name in digests]), strict=True):
            if found != digests[name]:
                raise WeightsError(
                    f"{directory / name}: its SHA-256 digest is {found}, expected {digests[name]} ({DIGEST_FILE}); "
                    "fetch the file again"
                )
    logger.info("the SHA-256 digests of %d files match %s", len(digests), path)


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: not a readable text file: {error}; write it again with sha256sum") from error
    digests = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise WeightsError(f"{path}: line {number} is not a digest and a file name; write it again with sha256sum")
        digests[match[2]] = match[1]
    return digests


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}; fetch it again") from error
