"""The operations of `llama2-server usage`; servers may run on the same data directory at the same time."""

import sqlite3
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import TypeVar

from llama2_server.usage.errors import LedgerError, StoreUnavailable
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.local import statements
from llama2_server.usage.local.database import Database
from llama2_server.usage.local.local_ledger import check_directory, file_of
from llama2_server.usage.records import DailyUsage
from llama2_server.usage.store import Store

STALL_SECONDS = 10.0  # without an accepted record, `forward_records` fails

Result = TypeVar("Result")


def read_local_totals(
    data_directory: Path, account_id: str | None = None, since: date | None = None, until: date | None = None
) -> list[DailyUsage]:
    """Return the usage in the local database of one account, or of all with None.

    Raises:
        LedgerError: the database cannot be read.
    """
    return _in_database(
        data_directory, lambda connection: statements.totals(connection, account_id, since, until), writes=False
    )


async def read_store_totals(
    url: str, account_id: str | None = None, since: date | None = None, until: date | None = None
) -> list[DailyUsage]:
    """Return the usage in the store of one account, or of all with None.

    Raises:
        LedgerError: the store cannot be read.
    """
    store = Store(url)
    try:
        await store.migrate()
        return await store.totals(account_id, since, until)
    except StoreUnavailable as error:
        raise LedgerError(f"--usage-url: {error}") from error
    finally:
        await store.close()


def check_local_totals(data_directory: Path, *, repair: bool) -> list[str]:
    """Compare the daily totals of the local database with its records, and return one line per difference.

    With `repair`, the totals of the records replace the stored totals.

    Raises:
        LedgerError: the database cannot be used.
    """

    def check(connection: sqlite3.Connection) -> list[str]:
        stored, summed = statements.wrong_totals(connection)
        if repair and (stored or summed):
            statements.rebuild_totals(connection)
        return _differences(stored, summed)

    return _in_database(data_directory, check, writes=repair)


async def check_store_totals(url: str, *, repair: bool) -> list[str]:
    """Compare the daily totals of the store with its records, like `check_local_totals`.

    Raises:
        LedgerError: the store cannot be used.
    """
    store = Store(url)
    try:
        await store.migrate()
        stored, summed = await store.wrong_totals(repair=repair)
        return _differences(stored, summed)
    except StoreUnavailable as error:
        raise LedgerError(f"--usage-url: {error}") from error
    finally:
        await store.close()


def retry_rejected(data_directory: Path) -> int:
    """Let the servers send the rejected records again, and return their number.

    Raises:
        LedgerError: the database cannot be used.
    """
    return _in_database(data_directory, statements.retry_rejected, writes=True)


async def forward_records(data_directory: Path, url: str) -> tuple[int, int]:
    """Forward all records of a data directory, and return the numbers of forwarded and of rejected records.

    The running requests of killed servers become records first.

    Raises:
        LedgerError: the directory or the store cannot be used, or the store accepts no records.
    """
    ledger = await Ledger.open(data_directory=data_directory, neuron_costs={}, store=Store(url))
    try:
        before = left = ledger.pending
        while not await ledger.flush(STALL_SECONDS):
            if ledger.pending >= left:
                raise LedgerError(f"--usage-url: the store accepts no records ({left} are left); try again later")
            left = ledger.pending
        return before, ledger.rejected
    finally:
        await ledger.close(0)


def _in_database(data_directory: Path, work: Callable[[sqlite3.Connection], Result], *, writes: bool) -> Result:
    """Run the work in a transaction of the local database; a transaction that only reads delays no server."""
    check_directory(data_directory)
    database = Database.open(file_of(data_directory))
    try:
        with database.transaction(writes=writes) as connection:
            return work(connection)
    except sqlite3.Error as error:
        raise LedgerError(f"--data-directory: {database.path}: {error}") from error
    finally:
        database.close()


def _differences(stored: Sequence[DailyUsage], summed: Sequence[DailyUsage]) -> list[str]:
    by_key = {(one.account_id, one.day, one.model): one for one in summed}
    lines = [
        f"{one.account_id} {one.day} {one.model}: the total is {one}, the records have "
        f"{by_key.pop((one.account_id, one.day, one.model), None)}"
        for one in stored
    ]
    return lines + [
        f"{one.account_id} {one.day} {one.model}: no total, the records have {one}" for one in by_key.values()
    ]
