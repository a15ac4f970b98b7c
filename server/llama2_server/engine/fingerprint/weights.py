"""The digest of a checkpoint's weights: every byte of their files, read on a thread of low priority, and remembered."""

import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from llama2_server.engine import disk_cache
from llama2_server.engine.fingerprint.fingerprint import Fingerprint

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 20
LOWEST_PRIORITY = 19


class WeightFiles:
    """The files of the weights as they are now; create it before the weights are loaded.

    `quick_digest` of the loaded weights distinguishes files with equal names, sizes and times.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = sorted(path.resolve() for path in set(paths))
        self._states = self._stat()

    def known_digest(self, cache: Path, quick_digest: str) -> str | None:
        """Return the digest that an earlier start wrote to the file `cache`; None if these files have changed."""
        digest = disk_cache.load(cache, self._key(quick_digest))
        return digest if isinstance(digest, str) else None

    def hash(self, cache: Path, quick_digest: str) -> str | None:
        """Read all files, write their digest to the file `cache` and return it.

        Return None, and log the reason, if a file cannot be read or is not the one that was loaded.
        """
        try:
            digest = hashlib.sha256()
            for path in self._paths:
                digest.update(f"{_sha256(path)}  {path.name}\n".encode())
            if self._stat() != self._states:
                logger.warning("no fingerprint: the weights' files have changed since they were loaded")
                return None
        except OSError as error:
            logger.warning("no fingerprint: the weights' files cannot be read: %s", error)
            return None
        disk_cache.save(cache, self._key(quick_digest), digest.hexdigest())
        return digest.hexdigest()

    def _stat(self) -> list[tuple[str, int, int]]:
        """Return name, size in bytes and modification time in nanoseconds of each file."""
        return [(str(path), status.st_size, status.st_mtime_ns) for path in self._paths for status in (path.stat(),)]

    def _key(self, quick_digest: str) -> str:
        return json.dumps([quick_digest, self._states])


def add_weights(fingerprint: Fingerprint, files: WeightFiles, cache: Path, quick_digest: str) -> None:
    """Complete a fingerprint with the digest of the weights: at once if it is known, otherwise on a thread."""
    if fingerprint.depends_on_neighbors:
        logger.info("no fingerprint: on this device, the text of a reply can depend on the other running requests")
        return
    if (known := files.known_digest(cache, quick_digest)) is not None:
        fingerprint.set_weights(known)
        return

    def work() -> None:
        _lower_priority()
        started_at = time.monotonic()
        try:
            digest = files.hash(cache, quick_digest)
            if digest is not None:
                fingerprint.set_weights(digest)
        finally:
            fingerprint.is_pending = False  # after the value, so that readers never find neither
        if digest is not None:
            logger.info(
                "fingerprint %s; hashed the weights in %.1f s", fingerprint.value, time.monotonic() - started_at
            )

    fingerprint.is_pending = True
    threading.Thread(target=work, name="fingerprint", daemon=True).start()


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


def _lower_priority() -> None:
    """Let every other thread run first: Linux has a priority per thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
