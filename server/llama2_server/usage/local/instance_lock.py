"""A lock that a server holds while it runs, so that no other server ends its running requests."""

import fcntl
import os
import uuid
from pathlib import Path
from typing import Self


class InstanceLock:
    """A file lock, held until `release`; the operating system releases it when the process ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.instance = path.stem
        """The name in the running requests of this server."""
        self._path = path
        self._descriptor = descriptor

    @classmethod
    def create(cls, directory: Path) -> Self:
        """Create and acquire a lock with a new name.

        Raises:
            OSError: the directory cannot be used.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The file gets its final name after it is locked, so that no process can acquire it first.
        unnamed = directory / f"{uuid.uuid4().hex}.new"
        descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path = unnamed.with_suffix(".lock")
        unnamed.rename(path)
        return cls(path, descriptor)

    @classmethod
    def acquire_ended(cls, directory: Path) -> list[Self]:
        """Acquire and return the locks of all servers that have ended without a release."""
        acquired = (cls._acquire(path) for path in sorted(directory.glob("*.lock")))
        return [lock for lock in acquired if lock is not None]

    @classmethod
    def _acquire(cls, path: Path) -> Self | None:
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return cls(path, descriptor)

    def unlock(self) -> None:
        """Release the lock, and keep its file, so that the next start acquires it."""
        os.close(self._descriptor)

    def release(self) -> None:
        """Release the lock, and delete its file."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
