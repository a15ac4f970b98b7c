"""Journal of running requests and of records that are not in the store yet, on the local disk.

One `write` appends a line when a request is admitted, from time to time while it runs, and when it finishes. SIGKILL
loses no line, but up to PROGRESS_TOKENS - 1 output tokens per running request that were not written yet. A power
failure or a kernel crash loses lines that were not synced.
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
"""Upper bound (exclusive) of the output tokens of a running request that a SIGKILL loses."""
# Upper bound of the extra length of the last line of a request, compared with its first.
FINISHED_LINE_EXTRA_BYTES = 256
MAX_SEGMENT_BYTES = 1024 * 1024
# Space for the lines of a few hundred requests. With less, new requests will soon be rejected.
PROBE_BYTES = 64 * 1024


class Journal:
    """Running requests, and records that are not in the store yet; thread-safe."""

    def __init__(self, segments: Segments, limit_bytes: int) -> None:
        self._segments = segments
        self._limit_bytes = limit_bytes
        # One file may contain only stored records, so a file is at most a sixteenth of the limit.
        self._segment_bytes = min(limit_bytes // 16, MAX_SEGMENT_BYTES)
        self._running: dict[str, RunningRequest] = {}
        self._reserved: dict[str, int] = {}  # bytes for the last line of each of them
        self._reserved_bytes = 0
        self._pending: deque[tuple[UsageRecord, Segment]] = deque()
        self._lock = threading.Lock()
        self._writable = True

    @classmethod
    def open(cls, directory: Path, limit_bytes: int) -> Self:
        """Open a journal, and recover the journals of all ended processes in the directory.

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
        """Number of records that are not in the store yet."""
        return len(self._pending)

    @property
    def size(self) -> int:
        """Size on disk in bytes."""
        return self._segments.size

    @property
    def writable(self) -> bool:
        """Whether the disk accepted the last line, or the last probe."""
        return self._writable

    def probe_disk(self) -> None:
        """Update `writable`: write a small file if the disk is almost full, or did not accept a line; blocks."""
        try:
            if self._writable and self._segments.free_bytes() >= PROBE_BYTES:
                return
            self._segments.write_probe(PROBE_BYTES)
        except OSError as error:
            if self._writable:
                logger.error("the disk of the usage journal is not writable: %s", error.strerror)  # noqa: TRY400 - one line
            self._writable = False
        else:
            if not self._writable:
                logger.warning("the disk of the usage journal is writable again")
            self._writable = True

    @property
    def oldest_finished_at(self) -> datetime | None:
        """When the request of the oldest pending record finished; None without pending records."""
        try:
            return self._pending[0][0].finished_at
        except IndexError:
            return None

    def check_capacity(self, request: RunningRequest) -> None:
        """Check that `admit` has space for the request; write nothing.

        Raises:
            UsageJournalFull: there is not enough space.
        """
        line = encode(request)
        with self._lock:
            self._check_capacity(line)

    def admit(self, request: RunningRequest) -> None:
        """Write that a request runs, and reserve space for its last line.

        Raises:
            UsageJournalFull: there is not enough space.
        """
        line = encode(request)
        with self._lock:
            reserve = self._check_capacity(line)
            try:
                self._append(line)
            except OSError as error:
                logger.warning("cannot write to the usage journal: %s", error.strerror)
                raise UsageJournalFull("usage cannot be recorded now; retry") from error
            self._running[request.request_id] = request
            self._reserved[request.request_id] = reserve
            self._reserved_bytes += reserve

    def progress(self, request_id: str, tokens: TokenUsage) -> None:
        """Store the computed tokens; write them after the prefill, then every PROGRESS_TOKENS."""
        request = self._running.get(request_id)
        if request is None:
            return  # it has finished in the meantime
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
        """Write a request's record; if that fails, keep it in memory until the store has it."""
        with self._lock:
            request = self._running.pop(request_id, None)
            if request is None:
                logger.error("request %s has already finished; its second end was ignored", request_id)
                return None
            record = request.finish(outcome, tokens, finished_at, cached=cached)
            self._reserved_bytes -= self._reserved.pop(request_id)
            try:
                self._append(encode(record))
            except OSError as error:
                logger.warning("cannot write to the usage journal: %s", error.strerror)
            self._add_pending(record, self._segments.current)
        return record

    def oldest(self, count: int) -> list[UsageRecord]:
        """Return the oldest pending records."""
        with self._lock:
            return [record for record, _ in islice(self._pending, count)]

    def settle(self, count: int) -> None:
        """Remove the oldest records, because the store has them."""
        with self._lock:
            for _ in range(count):
                self._pending.popleft()[1].unflushed_records -= 1
            if not self._pending and self._segments.current.size > self._segment_bytes:
                self._rotate()
            self._segments.drop_flushed()

    def sync(self) -> None:
        """Sync the written lines to the disk; blocks until the disk has them."""
        with self._lock:
            descriptors = self._segments.unsynced()
        fsync_and_close(descriptors)

    def release(self) -> None:
        """Close all files; keep them for the next process if they have pending records or running requests."""
        with self._lock:
            self._segments.release(remove=not self._pending and not self._running)

    def _check_capacity(self, line: bytes) -> int:
        """Return the space for a request's last line; raise UsageJournalFull if it does not fit with `line`."""
        reserve = len(line) + FINISHED_LINE_EXTRA_BYTES
        if self.size + self._reserved_bytes + len(line) + reserve > self._limit_bytes:
            raise UsageJournalFull("usage cannot be recorded now; retry")
        return reserve

    def _append(self, line: bytes) -> None:
        if self._segments.current.size > self._segment_bytes:
            self._rotate()
        try:
            self._segments.append(line)
        except OSError:
            self._writable = False
            raise

    def _append_if_room(self, line: bytes) -> None:
        if self.size + self._reserved_bytes + len(line) > self._limit_bytes:
            return  # the reserved space is for last lines only
        try:
            self._append(line)
        except OSError as error:
            logger.warning("cannot write to the usage journal: %s", error.strerror)

    def _rotate(self) -> None:
        try:
            self._segments.rotate(b"".join(encode(request) for request in self._running.values()))
        except OSError as error:
            logger.warning("cannot start a new file of the usage journal, the old one stays in use: %s", error.strerror)

    def _add_pending(self, record: UsageRecord, segment: Segment) -> None:
        segment.unflushed_records += 1
        self._pending.append((record, segment))

    def _recover(self, lock: InstanceLock) -> None:
        """Add an ended process's records, and one record for each of its running requests."""
        recovery = _Recovery(self._add_pending)
        for segment in self._segments.take_over(lock):
            recovery.read(segment)
        recovery.interrupt()
        self._segments.drop_flushed()


class _Recovery:
    """Reader of an ended process's files, in their order."""

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
                    logger.warning("%s: ignored an incomplete or damaged line", segment.path.name)

    def interrupt(self) -> None:
        if self._last is None:
            return
        finished_at = datetime.fromtimestamp(self._last.path.stat().st_mtime, UTC)
        for request in self._running.values():
            record = request.finish(INTERRUPTED, request.tokens, finished_at, cached=False)
            self._add_pending(record, self._last)
        logger.info(
            "recovered the journal of a killed server: %d records, %d interrupted requests",
            self._records,
            len(self._running),
        )
