"""The thread that changes the usage database. It commits all changes that have arrived together, in their order.

If the disk does not accept a transaction, the changes that must not be lost wait in memory, the others fail, and the
thread tries again each second.
"""

import asyncio
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from llama2_server.usage.local.database import Database

logger = logging.getLogger(__name__)

TICK_SECONDS = 1.0  # a power failure loses at most this much
MAX_CHANGES = 1000  # of one transaction
# Space for a few hundred records. With less, new requests will soon be rejected.
PROBE_BYTES = 64 * 1024

Result = TypeVar("Result")
Change = Callable[[sqlite3.Connection], Any]


def no_change(connection: sqlite3.Connection) -> None:
    """Change nothing."""


def both(change: Change, also: Change) -> Change:
    """Return a change that makes both changes."""

    def make(connection: sqlite3.Connection) -> None:
        change(connection)
        also(connection)

    return make


class DatabaseUnavailable(Exception):
    """The database did not accept a change, or could not be read."""


@dataclass(slots=True)
class _Job:
    change: Change
    future: "asyncio.Future[Any] | None" = None
    keep: bool = False  # the change waits in memory if the disk does not accept it
    reads: bool = False


class Writer:
    """The thread. Use it from one event loop; `submit` can be called on any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._kept: list[_Job] = []
        self._accepts = True
        self._dirty = False
        self._tick_at = time.monotonic() + TICK_SECONDS
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._thread.start()

    @property
    def writable(self) -> bool:
        """Whether the database accepts new requests: the disk takes its changes, and its path leads to it."""
        return self._accepts and self._database.in_place

    @property
    def kept(self) -> int:
        """Number of changes that wait in memory for the disk."""
        return len(self._kept)

    @property
    def size(self) -> int:
        """Size of the database on disk, in bytes."""
        return self._database.size()

    def submit(self, change: Change, *, keep: bool = False) -> None:
        """Make a change later; with `keep`, it waits in memory as long as the disk does not accept it."""
        self._jobs.put(_Job(change, keep=keep))

    def keep(self, change: Change) -> "asyncio.Future[Any]":
        """Make a change that must not be lost, and return a future that is set after the disk has accepted it."""
        future = self._loop.create_future()
        self._jobs.put(_Job(change, future, keep=True))
        return future

    async def run(self, change: Callable[[sqlite3.Connection], Result]) -> Result:
        """Make a change, and return its result after its commit.

        Raises:
            DatabaseUnavailable: the disk does not accept it; it was not made.
        """
        result: Result = await self._result(_Job(change))
        return result

    async def read(self, query: Callable[[sqlite3.Connection], Result]) -> Result:
        """Return the result of a query, after all earlier changes.

        Raises:
            DatabaseUnavailable: the database cannot be read.
        """
        result: Result = await self._result(_Job(query, reads=True))
        return result

    async def attempted(self) -> None:
        """Wait until all earlier changes are committed, or wait in memory for the disk."""
        await self._result(_Job(lambda _: None, reads=True))

    async def probe(self) -> None:
        """Update `writable` now; the thread also does it each second."""
        await self._result(_Job(lambda _: self._tick(), reads=True))

    async def close(self) -> None:
        """Make the remaining changes, end the thread, and close the database."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    async def _result(self, job: _Job) -> Any:
        job.future = self._loop.create_future()
        self._jobs.put(job)
        return await job.future

    def _run(self) -> None:
        closing = False
        while not closing:
            jobs, closing = self._take()
            for reads, group in groupby(jobs, key=lambda job: job.reads):
                (self._read if reads else self._write)(list(group))
            if closing or time.monotonic() >= self._tick_at:
                self._tick()
        if self._kept:
            logger.error("%d changes of the usage database are lost, because the disk does not accept them", self.kept)
        self._database.close()

    def _take(self) -> tuple[list[_Job], bool]:
        """Wait for jobs or the next tick; return the jobs, and whether they are the last ones."""
        jobs: list[_Job] = []
        with suppress(queue.Empty):
            job = self._jobs.get(timeout=max(0.0, self._tick_at - time.monotonic()))
            while job is not None:
                jobs.append(job)
                if len(jobs) == MAX_CHANGES:
                    return jobs, False
                job = self._jobs.get_nowait()
            return jobs, True
        return jobs, False

    def _read(self, jobs: list[_Job]) -> None:
        for job in jobs:
            try:
                result = job.change(self._database.connection)
            except sqlite3.Error as error:
                self._fail([job], error)
            except Exception as error:  # raised again where the result is awaited
                self._resolve([(job, error)])
            else:
                self._resolve([(job, result)])

    def _write(self, jobs: list[_Job]) -> None:
        if not self._accepts:  # the next tick tries again
            self._fail(jobs, DatabaseUnavailable("the disk does not accept changes"))
            return
        self._database.check_file()
        if (error := self._transact(jobs)) is not None:
            self._set_accepts(error)

    def _transact(self, jobs: list[_Job]) -> Exception | None:
        """Commit the changes in one transaction, or each in its own if one of them is faulty.

        Return the error of the disk if it does not accept them.
        """
        try:
            with self._database.transaction() as connection:
                results = [job.change(connection) for job in jobs]
        except Exception as error:
            if _is_of_the_disk(error):
                self._fail(jobs, error)
                return error
            if len(jobs) > 1:
                return next((failed for job in jobs if (failed := self._transact([job])) is not None), None)
            self._reject(jobs[0], error)
            return None
        self._dirty = True
        self._resolve(list(zip(jobs, results, strict=True)))
        return None

    def _tick(self) -> None:
        """Restore a deleted file, retry the kept changes, sync the commits, and find out whether the disk is full."""
        self._tick_at = time.monotonic() + TICK_SECONDS
        error: Exception | None = None
        try:
            self._database.check_file()
            self._probe_disk()
            if not self._accepts:
                kept, self._kept = self._kept, []
                error = self._transact(kept)
            if self._dirty and error is None:
                self._database.checkpoint()
                self._dirty = False
        except (OSError, sqlite3.Error) as failed:
            error = failed
        self._set_accepts(error)

    def _probe_disk(self) -> None:
        """Write a small file if the disk is almost full, or did not accept a change."""
        directory = self._database.path.parent
        disk = os.statvfs(directory)
        if self._accepts and disk.f_bavail * disk.f_frsize >= PROBE_BYTES:
            return
        path = directory / f"{self._database.path.name}.probe"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(bytes(PROBE_BYTES))
        finally:
            path.unlink(missing_ok=True)

    def _set_accepts(self, error: Exception | None) -> None:
        if error is not None and self._accepts:
            logger.error("the usage database is not writable: %s", _reason(error))
        elif error is None and not self._accepts:
            logger.warning("the usage database is writable again")
        self._accepts = error is None

    def _fail(self, jobs: list[_Job], error: Exception) -> None:
        self._kept.extend(job for job in jobs if job.keep)
        self._resolve([(job, DatabaseUnavailable(_reason(error))) for job in jobs if not job.keep])

    def _reject(self, job: _Job, error: Exception) -> None:
        """Drop a change that is faulty."""
        if not isinstance(error, DatabaseUnavailable):
            logger.error("a change of the usage database failed", exc_info=error)
        self._resolve([(job, error)])

    def _resolve(self, results: list[tuple[_Job, Any]]) -> None:
        waiting = [(job.future, result) for job, result in results if job.future is not None]
        if waiting:
            with suppress(RuntimeError):  # the loop is closed, so nothing waits
                self._loop.call_soon_threadsafe(_set_results, waiting)


def _set_results(results: "list[tuple[asyncio.Future[Any], Any]]") -> None:
    for future, result in results:
        if future.cancelled():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


def _is_of_the_disk(error: Exception) -> bool:
    """Return whether the database failed: full, locked, damaged or unreadable, not a faulty change."""
    return isinstance(error, OSError | sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
