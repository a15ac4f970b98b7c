"""Open the local database of a data directory, and end the running requests of killed servers."""

import logging
import sqlite3
from pathlib import Path
from typing import Self

from llama2_server.usage.errors import LedgerError
from llama2_server.usage.local import statements
from llama2_server.usage.local.database import Database
from llama2_server.usage.local.file_system import network_file_system
from llama2_server.usage.local.instance_lock import InstanceLock

logger = logging.getLogger(__name__)


def file_of(data_directory: Path) -> Path:
    """Return the path of the local database."""
    return data_directory / "usage.db"


class LocalLedger:
    """The local database, and the lock that shows that this server runs."""

    def __init__(self, database: Database, lock: InstanceLock, ended: list[str]) -> None:
        self.database = database
        self.ended = ended
        """The names of servers that have ended without a release of their lock."""
        self._lock = lock

    @classmethod
    def open(cls, data_directory: Path) -> Self:
        """Open the database, and write a record for each running request of a killed server.

        Raises:
            LedgerError: the directory cannot be used.
        """
        try:
            data_directory.mkdir(parents=True, exist_ok=True)
            check_directory(data_directory)
            lock = InstanceLock.create(data_directory / "usage-locks")
        except OSError as error:
            raise LedgerError(f"--data-directory: {data_directory}: {error.strerror}") from error
        try:
            database = Database.open(file_of(data_directory))
            try:
                ended = _recover(database, data_directory / "usage-locks", lock)
            except sqlite3.Error as error:
                database.close()
                raise LedgerError(f"--data-directory: {database.path}: {error}; check the file") from error
        except BaseException:
            lock.release()
            raise
        return cls(database, lock, ended)

    @property
    def instance(self) -> str:
        """The name of this server in its running requests."""
        return self._lock.instance

    def release(self) -> None:
        """Release the lock; the next start ends requests that still run."""
        self._lock.release()


def check_directory(data_directory: Path) -> None:
    """Check that the database can be in the directory.

    Raises:
        LedgerError: the directory is on a network file system, or has records of an older version.
    """
    kind = network_file_system(data_directory)
    if kind is not None:
        raise LedgerError(
            f"--data-directory: {data_directory} is on a network file system ({kind}), and the usage database is not "
            "safe there; use a local disk"
        )
    if any((data_directory / "journal").glob("*.journal")):
        raise LedgerError(
            f"--data-directory: {data_directory}/journal has usage records of an older version; start that version "
            "once to store them, or delete the directory"
        )


def _recover(database: Database, directory: Path, own: InstanceLock) -> list[str]:
    """End the running requests of servers that have ended, and return the names of these servers."""
    ended = {lock.instance: lock for lock in InstanceLock.acquire_ended(directory)}
    try:
        with database.transaction() as connection:
            for instance in ended:
                statements.release_claims(connection, instance)
            # A server without a lock file has ended, too: its directory was copied, or the file was deleted.
            running = statements.running_instances(connection) - {own.instance}
            for instance in sorted(running):
                if instance in ended or not (directory / f"{instance}.lock").exists():
                    interrupted = statements.interrupt(connection, instance)
                    logger.info("recovered the usage of a killed server: %d interrupted requests", interrupted)
    except BaseException:
        for lock in ended.values():
            lock.unlock()
        raise
    for lock in ended.values():
        lock.release()
    return list(ended)
