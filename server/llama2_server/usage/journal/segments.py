"""The journal's files: lines are appended to the newest one, and a file goes when nothing in it is needed any more."""

import contextlib
import errno
import logging
import os
from collections import deque
from pathlib import Path
from typing import Self

from llama2_server.usage.journal.instance_lock import InstanceLock

logger = logging.getLogger(__name__)


class Segment:
    """One file, of this process or of a dead one; `needed` counts its records that the store does not have."""

    def __init__(self, path: Path, size: int, owner: InstanceLock) -> None:
        self.path = path
        self.size = size
        self.owner = owner
        self.needed = 0


class Segments:
    """The files of this process, and before them those of the dead that it has taken over."""

    def __init__(self, lock: InstanceLock) -> None:
        self.size = 0  # bytes of all files
        self._lock = lock
        self._segments: deque[Segment] = deque()
        self._number = 0
        self._descriptor = -1
        self._retired: list[int] = []  # written and not yet synced
        self._dirty = False
        self._torn = False

    @classmethod
    def create(cls, directory: Path) -> Self:
        """No file of the dead, and a new one of our own.

        Raises:
            OSError: the directory cannot be written to.
        """
        segments = cls(InstanceLock.create(directory))
        segments.rotate(b"")
        return segments

    @property
    def current(self) -> Segment:
        """The file that lines are appended to."""
        return self._segments[-1]

    def take_over(self, lock: InstanceLock) -> list[Segment]:
        """A dead process's files, oldest first; they are dropped like our own. Only before our second file."""
        paths = sorted(lock.directory.glob(f"{lock.instance}.*.journal"))
        taken = [Segment(path, path.stat().st_size, lock) for path in paths]
        own = self._segments.pop()
        self._segments.extend((*taken, own))
        self.size += sum(segment.size for segment in taken)
        if not taken:
            lock.release(remove=True)
        return taken

    def append(self, line: bytes) -> None:
        """Write a line; it outlives the process from here on, and a power failure once it is synced.

        Raises:
            OSError: the disk did not take the whole line.
        """
        # A line break ends what a failed write may have left.
        data = b"\n" + line if self._torn else line
        self._torn = self._dirty = True
        written = os.write(self._descriptor, data)
        self.current.size += written
        self.size += written
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._torn = False

    def rotate(self, first_lines: bytes) -> None:
        """Go on in a new file, which begins with these lines.

        Raises:
            OSError: there can be no new file; the old one goes on.
        """
        path = self._lock.directory / f"{self._lock.instance}.{self._number + 1:09}.journal"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        try:
            if os.write(descriptor, first_lines) < len(first_lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.close(descriptor)
            path.unlink()
            raise
        if self._descriptor >= 0:
            self._retired.append(self._descriptor)
        self._number += 1
        self._descriptor = descriptor
        self._segments.append(Segment(path, len(first_lines), self._lock))
        self.size += len(first_lines)
        self._dirty, self._torn = True, False

    def drop_needless(self) -> None:
        """Remove the oldest files, up to the first one that is needed; the current one stays."""
        while len(self._segments) > 1 and not self._segments[0].needed:
            segment = self._segments.popleft()
            self.size -= segment.size
            segment.path.unlink(missing_ok=True)
            if segment.owner is not self._lock and all(other.owner is not segment.owner for other in self._segments):
                segment.owner.release(remove=True)

    def unsynced(self) -> list[int]:
        """Descriptors that `fsync_and_close` takes, outside of any lock: it may take long."""
        retired, self._retired = self._retired, []
        if not self._dirty:
            return retired
        self._dirty = False
        return [*retired, os.dup(self._descriptor)]

    def release(self, *, remove: bool) -> None:
        """Close all; with `remove`, nothing of our own is needed any more."""
        for descriptor in (*self._retired, self._descriptor):
            os.close(descriptor)
        for segment in self._segments:
            if remove and segment.owner is self._lock:
                segment.path.unlink(missing_ok=True)
        others = {id(segment.owner): segment.owner for segment in self._segments if segment.owner is not self._lock}
        for lock in others.values():
            lock.release(remove=False)
        self._lock.release(remove=remove)


def fsync_and_close(descriptors: list[int]) -> None:
    """Bring files to the disk; a failure is logged: what it means for the lines cannot be known."""
    for descriptor in descriptors:
        with contextlib.closing(os.fdopen(descriptor, "wb", buffering=0)):
            try:
                os.fsync(descriptor)
            except OSError as error:
                logger.warning("the usage journal cannot be synced: %s", error.strerror)
