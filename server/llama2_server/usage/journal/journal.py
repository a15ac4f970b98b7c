"""The journal: what must survive this process, on its own disk, until the store has it.

A line is written with one `write` when a request is admitted, when it ends, and now and then between. SIGKILL loses no
line; what it loses is what was never written: fewer than PROGRESS_TOKENS output tokens a request. A power failure
or a kernel's crash loses what was not synced.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Self

from llama2_server.errors import UsageJournalFull
from llama2_server.usage.journal.encoding import Progress, decode_all, encode
from llama2_server.usage.journal.instance_lock import InstanceLock
from llama2_server.usage.journal.segments import Segment, Segments, fsync_and_close
from llama2_server.usage.pricing import TokenUsage
from llama2_server.usage.records import INTERRUPTED, RunningRequest, UsageRecord

logger = logging.getLogger(__name__)

PROGRESS_TOKENS = 16
"""A SIGKILL loses fewer output tokens of a running request than this."""
# What an ended line has more than the running line of the same request.
ENDED_LINE_EXTRA_BYTES = 256
LARGEST_SEGMENT_BYTES = 1024 * 1024


class Journal:
    """Requests that run, and records that the store does not have yet; safe to use from several threads."""

    def __init__(self, segments: Segments, limit_bytes: int) -> None:
        self._segments = segments
        self._limit_bytes = limit_bytes
        # At most one file of stored records lies about: a sixteenth of what there may be.
        self._segment_bytes = min(limit_bytes // 16, LARGEST_SEGMENT_BYTES)
        self._running: dict[str, RunningRequest] = {}
        self._reserved: dict[str, int] = {}  # bytes for the end of each of them
        self._reserved_bytes = 0
        self._pending: deque[tuple[UsageRecord, Segment]] = deque()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path, limit_bytes: int) -> Self:
        """A journal that has taken over those of all dead processes in the directory.

        Raises:
            OSError: the directory cannot be used.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        journal = cls(Segments.create(directory), limit_bytes)
        for lock in InstanceLock.acquire_stale(directory):
            journal._recover(lock)
        return journal

    @property
    def pending(self) -> int:
        """Records that the store does not have yet."""
        return len(self._pending)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self._segments.size

    @property
    def oldest_finished_at(self) -> datetime | None:
        """When the oldest pending record's request ended."""
        try:
            return self._pending[0][0].finished_at
        except IndexError:
            return None

    def check_capacity(self, request: RunningRequest) -> None:
        """Look whether `admit` would have room; nothing is written.

        Raises:
            UsageJournalFull: there is no room.
        """
        line = encode(request)
        with self._lock:
            self._check_capacity(line)

    def admit(self, request: RunningRequest) -> None:
        """Write down that a request runs, with room for its end.

        Raises:
            UsageJournalFull: there is no room.
        """
        line = encode(request)
        with self._lock:
            reserve = self._check_capacity(line)
            try:
                self._append(line)
            except OSError as error:
                logger.warning("the usage journal cannot be written: %s", error.strerror)
                raise UsageJournalFull("usage cannot be recorded now; try again") from error
            self._running[request.request_id] = request
            self._reserved[request.request_id] = reserve
            self._reserved_bytes += reserve

    def progress(self, request_id: str, tokens: TokenUsage) -> None:
        """Take note of what was computed; written down after the prefill, then once every PROGRESS_TOKENS."""
        request = self._running.get(request_id)
        if request is None:
            return  # it has ended meanwhile
        new_tokens = tokens.output_tokens - request.tokens.output_tokens
        if new_tokens < PROGRESS_TOKENS and tokens.input_tokens == request.tokens.input_tokens:
            return
        with self._lock:
            request.tokens = tokens
            if request_id in self._running:
                self._append_if_room(encode(Progress(request_id, tokens)))

    def finish(
        self, request_id: str, outcome: str, tokens: TokenUsage, finished_at: datetime, *, cached: bool
    ) -> UsageRecord | None:
        """Write down a request's record; where the disk refuses, it stays in memory until the store has it."""
        with self._lock:
            request = self._running.pop(request_id, None)
            if request is None:
                logger.error("request %s has ended before; its second end is ignored", request_id)
                return None
            record = request.finish(outcome, tokens, finished_at, cached=cached)
            self._reserved_bytes -= self._reserved.pop(request_id)
            try:
                self._append(encode(record))
            except OSError as error:
                logger.warning("the usage journal cannot be written: %s", error.strerror)
            self._add_pending(record, self._segments.current)
        return record

    def oldest(self, count: int) -> list[UsageRecord]:
        """The records that have waited longest."""
        with self._lock:
            return [record for record, _ in islice(self._pending, count)]

    def settle(self, count: int) -> None:
        """The store has so many of the oldest records."""
        with self._lock:
            for _ in range(count):
                self._pending.popleft()[1].needed -= 1
            if not self._pending and self._segments.current.size > self._segment_bytes:
                self._rotate()
            self._segments.drop_needless()

    def sync(self) -> None:
        """Bring to the disk what was written; blocks for as long as the disk takes."""
        with self._lock:
            descriptors = self._segments.unsynced()
        fsync_and_close(descriptors)

    def release(self) -> None:
        """Close all files; they go if nothing in them is needed, and else wait for the next process."""
        with self._lock:
            self._segments.release(remove=not self._pending and not self._running)

    def _check_capacity(self, line: bytes) -> int:
        """The room that a request's end needs, if it and the line are there."""
        reserve = len(line) + ENDED_LINE_EXTRA_BYTES
        if self.size + self._reserved_bytes + len(line) + reserve > self._limit_bytes:
            raise UsageJournalFull("usage cannot be recorded now; try again")
        return reserve

    def _append(self, line: bytes) -> None:
        if self._segments.current.size > self._segment_bytes:
            self._rotate()
        self._segments.append(line)

    def _append_if_room(self, line: bytes) -> None:
        if self.size + self._reserved_bytes + len(line) > self._limit_bytes:
            return  # the end's room is worth more than this
        try:
            self._append(line)
        except OSError as error:
            logger.warning("the usage journal cannot be written: %s", error.strerror)

    def _rotate(self) -> None:
        try:
            self._segments.rotate(b"".join(encode(request) for request in self._running.values()))
        except OSError as error:
            logger.warning("the usage journal goes on in its old file: %s", error.strerror)

    def _add_pending(self, record: UsageRecord, segment: Segment) -> None:
        segment.needed += 1
        self._pending.append((record, segment))

    def _recover(self, lock: InstanceLock) -> None:
        """Take a dead process's records, and make one of every request that it was running."""
        recovery = _Recovery(self._add_pending)
        for segment in self._segments.take_over(lock):
            recovery.read(segment)
        recovery.interrupt()
        self._segments.drop_needless()


class _Recovery:
    """Reads a dead process's files in their order."""

    def __init__(self, add_pending: Callable[[UsageRecord, Segment], None]) -> None:
        self._add_pending = add_pending
        self._running: dict[str, RunningRequest] = {}
        self._last: Segment | None = None
        self._records = 0

    def read(self, segment: Segment) -> None:
        self._last = segment
        for entry in decode_all(segment.path.read_bytes()):
            match entry:
                case RunningRequest():
                    self._running[entry.request_id] = entry
                case Progress() if entry.request_id in self._running:
                    self._running[entry.request_id].tokens = entry.tokens
                case UsageRecord():
                    self._running.pop(entry.request_id, None)
                    self._add_pending(entry, segment)
                    self._records += 1
                case None:
                    logger.warning("%s: a torn or damaged line is left out", segment.path.name)

    def interrupt(self) -> None:
        if self._last is None:
            return
        finished_at = datetime.fromtimestamp(self._last.path.stat().st_mtime, UTC)
        for request in self._running.values():
            record = request.finish(INTERRUPTED, request.tokens, finished_at, cached=False)
            self._add_pending(record, self._last)
        logger.info(
            "recovered the journal of a server that was killed: %d records, %d requests interrupted",
            self._records,
            len(self._running),
        )
