"""Files of the journal: new lines go to the newest file, and a file without unflushed records is deleted."""

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
    """One file, of this process or of an ended one; `unflushed_records` are not in the store yet."""

    def __init__(self, path: Path, size: int, owner: InstanceLock) -> None:
        self.path = path
        self.size = size
        self.owner = owner
        self.unflushed_records = 0


class Segments:
    """The files of this process, preceded by the recovered files of ended processes."""

    def __init__(self, lock: InstanceLock) -> None:
        self.size = 0  # bytes of all files
        self._lock = lock
        self._segments: deque[Segment] = deque()
        self._number = 0
        self._descriptor = -1
        self._retired: list[int] = []  # written and not yet synced
        self._dirty = False
        self._incomplete = False

    @classmethod
    def create(cls, directory: Path) -> Self:
        """Return segments with one new file of this process.

        Raises:
            OSError: the directory cannot be written to.
        """
        segments = cls(InstanceLock.create(directory))
        segments.rotate(b"")
        return segments

    @property
    def current(self) -> Segment:
        """The file to which lines are appended."""
        return self._segments[-1]

    def take_over(self, lock: InstanceLock) -> list[Segment]:
        """Add and return an ended process's files, oldest first; call it before the first `rotate`."""
        paths = sorted(lock.directory.glob(f"{lock.instance}.*.journal"))
        recovered = [Segment(path, path.stat().st_size, lock) for path in paths]
        own = self._segments.pop()
        self._segments.extend((*recovered, own))
        self.size += sum(segment.size for segment in recovered)
        if not recovered:
            lock.release(remove=True)
        return recovered

    def append(self, line: bytes) -> None:
        """Write a line; it survives the end of the process, and after a sync also a power failure.

        Raises:
            OSError: the write was incomplete.
        """
        # The line break ends an incomplete line of a failed write.
        data = b"\n" + line if self._incomplete else line
        self._incomplete = self._dirty = True
        written = os.write(self._descriptor, data)
        self.current.size += written
        self.size += written
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._incomplete = False

    def rotate(self, first_lines: bytes) -> None:
        """Start a new file with these lines.

        Raises:
            OSError: the file cannot be created; the current file stays in use.
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
        self._dirty, self._incomplete = True, False

    def free_bytes(self) -> int:
        """Return the free space of the disk."""
        disk = os.statvfs(self._lock.directory)
        return disk.f_bavail * disk.f_frsize

    def write_probe(self, size: int) -> None:
        """Write a file of this size, and delete it.

        Raises:
            OSError: the disk does not accept it.
        """
        path = self._lock.directory / f"{self._lock.instance}.probe"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                if file.write(bytes(size)) != size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            path.unlink(missing_ok=True)

    def drop_flushed(self) -> None:
        """Delete the oldest files, up to the first with unflushed records; keep the current file."""
        while len(self._segments) > 1 and not self._segments[0].unflushed_records:
            segment = self._segments.popleft()
            self.size -= segment.size
            segment.path.unlink(missing_ok=True)
            if segment.owner is not self._lock and all(other.owner is not segment.owner for other in self._segments):
                segment.owner.release(remove=True)

    def unsynced(self) -> list[int]:
        """Return descriptors for `fsync_and_close`; do not hold a lock for that, because it may take long."""
        retired, self._retired = self._retired, []
        if not self._dirty:
            return retired
        self._dirty = False
        return [*retired, os.dup(self._descriptor)]

    def release(self, *, remove: bool) -> None:
        """Close all files; `remove` deletes the files of this process."""
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
    """Sync and close files; only log an error, because its effect on the lines is unknown."""
    for descriptor in descriptors:
        with contextlib.closing(os.fdopen(descriptor, "wb", buffering=0)):
            try:
                os.fsync(descriptor)
            except OSError as error:
                logger.warning("the usage journal cannot be synced: %s", error.strerror)
