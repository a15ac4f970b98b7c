"""The SQLite file of the ledger: how it is opened, committed, and restored after its deletion.

The file uses write-ahead logging. A commit survives the end of the process. A checkpoint syncs the log and the file, so
that a power failure loses at most the commits since the last checkpoint.
"""

import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import sqlalchemy as sa

from llama2_server.usage.errors import LedgerError, NewerSchema
from llama2_server.usage.migrations import upgrade

logger = logging.getLogger(__name__)

BUSY_SECONDS = 1.0  # how long a transaction waits for another process
OPEN_SECONDS = 10.0  # servers that start together migrate one after the other
MAX_LOG_BYTES = 4 * 1024 * 1024  # the log keeps this size after a checkpoint
_FILES = ("", "-wal", "-shm")

FileId = tuple[int, int]


class Database:
    """The open file. One thread uses it after `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connection = _connect(path, BUSY_SECONDS)
        self.in_place = True
        """Whether the path leads to the open file."""
        self._file_id = _file_id(path)

    @classmethod
    def open(cls, path: Path) -> "Database":
        """Create the file if it does not exist, migrate it, and open it.

        Raises:
            LedgerError: it cannot be used.
        """
        try:
            _create_private(path)
            _migrate(path)
            return cls(path)
        except OSError as error:
            raise LedgerError(f"--data-directory: {path}: {error.strerror}") from error
        except NewerSchema as error:
            raise LedgerError(
                f"--data-directory: a newer version of llama2-server has migrated {path}; use that version"
            ) from error
        except (sqlite3.Error, sa.exc.DBAPIError) as error:
            cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
            raise LedgerError(f"--data-directory: {path}: {cause}; check the file") from error

    @contextmanager
    def transaction(self, *, writes: bool = True) -> Iterator[sqlite3.Connection]:
        """Commit the changes of the body, all or none. A body that only reads sees one state of the database."""
        try:
            self.connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            yield self.connection
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                with suppress(sqlite3.Error):
                    self.connection.execute("ROLLBACK")
            raise

    def checkpoint(self) -> None:
        """Sync the commits to the disk, and copy them from the log to the file."""
        self.connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def check_file(self) -> None:
        """Update `in_place`, and restore the file if it has been deleted."""
        found = _file_id(self.path)
        if found is None:
            self._restore()
            return
        in_place = found == self._file_id
        if self.in_place and not in_place:
            logger.error("%s is another file than the open usage database; move that file away", self.path)
        elif in_place and not self.in_place:
            logger.warning("%s is the open usage database again", self.path)
        self.in_place = in_place

    def size(self) -> int:
        """Return the size of the file and its log, in bytes."""
        size = 0
        for path in self._paths():
            with suppress(OSError):  # it does not exist now
                size += path.stat().st_size
        return size

    def close(self) -> None:
        """Close the file. If another file has replaced it, copy it next to that one."""
        if not self.in_place:
            copy = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.copy")
            try:
                self._copy_to(copy)
                logger.error("the usage database was not at its path; its records are in %s", copy)
            except (OSError, sqlite3.Error) as error:
                logger.error("the records of the usage database are lost: %s", error)  # noqa: TRY400 - one line
        self.connection.close()

    def _restore(self) -> None:
        copy = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._copy_to(copy)
            for path in self._paths()[1:]:  # a log of the old file would damage the new one
                path.unlink(missing_ok=True)
            os.link(copy, self.path)  # unlike a rename, it never replaces a file
        except (OSError, sqlite3.Error) as error:
            if self.in_place:
                logger.error("%s was deleted and cannot be restored: %s", self.path, error)  # noqa: TRY400 - one line
            self.in_place = False
            return
        finally:
            with suppress(OSError):
                copy.unlink(missing_ok=True)
        self.connection.close()
        self.connection = _connect(self.path, BUSY_SECONDS)
        self._file_id, self.in_place = _file_id(self.path), True
        logger.error("%s was deleted; it was restored with all its records", self.path)

    def _copy_to(self, path: Path) -> None:
        _create_private(path)
        copy = sqlite3.connect(path, isolation_level=None)
        try:
            self.connection.backup(copy)
        finally:
            copy.close()

    def _paths(self) -> list[Path]:
        return [self.path.with_name(self.path.name + ending) for ending in _FILES]


def _connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
    # The first thread that uses the connection is not the only one: the ledger opens it before its writer runs.
    connection = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = NORMAL")  # sync in checkpoints, not in every commit
    connection.execute("PRAGMA wal_autocheckpoint = 0")  # a commit must not wait for a checkpoint
    connection.execute(f"PRAGMA journal_size_limit = {MAX_LOG_BYTES}")
    return connection


def _migrate(path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{path}", poolclass=sa.NullPool, connect_args={"timeout": OPEN_SECONDS})

    @sa.event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # otherwise the driver starts transactions itself
        _use_log(connection)

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    with engine.begin() as connection:
        upgrade(connection)


def _use_log(connection: sqlite3.Connection) -> None:
    """Switch the file to write-ahead logging; SQLite does not wait for other processes there."""
    deadline = time.monotonic() + OPEN_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)


def _create_private(path: Path) -> None:
    # SQLite itself would create the file readable for all; its other files get the same permissions.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def _file_id(path: Path) -> FileId | None:
    """Return the identity of the file at a path; None without a file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
