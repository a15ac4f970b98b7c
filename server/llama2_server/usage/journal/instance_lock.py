"""A lock that a process holds while it runs, so that no other process recovers its journal."""

import fcntl
import os
import uuid
from pathlib import Path
from typing import Self


class InstanceLock:
    """A file lock, held until `release`; the operating system releases it when the process ends."""

    def __init__(self, directory: Path, instance: str, descriptor: int) -> None:
        self.directory = directory
        self.instance = instance
        self._descriptor = descriptor

    @classmethod
    def create(cls, directory: Path) -> Self:
        """Create and acquire a lock with a new name."""
        instance = uuid.uuid4().hex
        # The file gets its final name after it is locked, so that no process can acquire it first.
        unnamed = directory / f"{instance}.new"
        descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(directory / f"{instance}.lock")
        return cls(directory, instance, descriptor)

    @classmethod
    def acquire_stale(cls, directory: Path) -> list[Self]:
        """Acquire the locks of all processes that have ended."""
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
        return cls(path.parent, path.stem, descriptor)

    def release(self, *, remove: bool) -> None:
        """Release the lock; `remove` deletes its file, once all journal files of the instance are deleted."""
        if remove:
            (self.directory / f"{self.instance}.lock").unlink(missing_ok=True)
        os.close(self._descriptor)
