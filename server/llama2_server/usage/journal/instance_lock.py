"""A lock that a process holds for its life, so that nobody takes its journal for a dead one's."""

import fcntl
import os
import uuid
from pathlib import Path
from typing import Self


class InstanceLock:
    """Held until `release`, or until the process ends in whatever way: the operating system sees to that."""

    def __init__(self, directory: Path, instance: str, descriptor: int) -> None:
        self.directory = directory
        self.instance = instance
        self._descriptor = descriptor

    @classmethod
    def create(cls, directory: Path) -> Self:
        """A lock under a name that nobody has had."""
        instance = uuid.uuid4().hex
        # It gets its name once it is held: nobody sees it free.
        unnamed = directory / f"{instance}.new"
        descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(directory / f"{instance}.lock")
        return cls(directory, instance, descriptor)

    @classmethod
    def acquire_stale(cls, directory: Path) -> list[Self]:
        """The locks of all processes that have died; they are held from now on."""
        taken = (cls._take(path) for path in sorted(directory.glob("*.lock")))
        return [lock for lock in taken if lock is not None]

    @classmethod
    def _take(cls, path: Path) -> Self | None:
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
        """Let go; with `remove`, there is nothing left that it guards."""
        if remove:
            (self.directory / f"{self.instance}.lock").unlink(missing_ok=True)
        os.close(self._descriptor)
