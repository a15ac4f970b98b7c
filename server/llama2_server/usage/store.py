"""The usage store: the usage records of all servers in PostgreSQL, through SQLAlchemy's asyncio engine."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from datetime import date
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from llama2_server.usage.budgets import statements as budgets
from llama2_server.usage.budgets.budget import BudgetUse, Month, Reservation
from llama2_server.usage.database import STATEMENT_SECONDS, connected, create_engine
from llama2_server.usage.errors import LedgerError, NewerSchema, StoreUnavailable
from llama2_server.usage.keys.key_store import KeyStore, PostgresKeyStore
from llama2_server.usage.migrations import upgrade
from llama2_server.usage.records import DailyUsage, UsageRecord
from llama2_server.usage.schema import (
    REBUILD_TOTALS,
    SUMMED_TOTALS,
    UPSERT,
    daily_usage,
    row_of,
    select_totals,
    usage_records,
)

logger = logging.getLogger(__name__)

OPERATION_SECONDS = STATEMENT_SECONDS + 5
RESERVATION_SECONDS = 5.0  # a call waits for it
# Migrations of one event loop wait for each other here, because their lock in a transaction would block the loop.
_migration_locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


class Store:
    """A database of usage records; it connects on first use.

    Every method except `close` raises StoreUnavailable if the database operation fails.

    Raises:
        LedgerError: the URL is not supported, or its driver is not installed.
    """

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url)
        self.keys: KeyStore = PostgresKeyStore(url)
        """The idempotency keys."""

    async def migrate(self) -> None:
        """Migrate the schema to the current version, if necessary.

        Raises:
            LedgerError: a newer version of this service has migrated the store.
        """
        try:
            async with self._connection() as connection, _alembic_lock(), connection.begin():
                await connection.run_sync(upgrade)
        except NewerSchema as error:
            raise LedgerError(
                "--usage-url: a newer version of llama2-server has migrated the store; use that version"
            ) from error

    async def upsert(self, records: Sequence[UsageRecord]) -> None:
        """Write all records or none; a record that exists changes monotonically, and the totals change with it."""
        # All servers lock rows in the same order, so that they never wait for each other in a circle.
        ordered = sorted(
            map(row_of, records), key=lambda row: (row["account"], row["day"], row["model"], row["request_id"])
        )
        async with self._connection() as connection, connection.begin():
            await connection.execute(sa.text(UPSERT), ordered)
            # A record has ended its reservation; only the space is freed here.
            await connection.execute(sa.text(budgets.DELETE), [{"request_id": record.request_id} for record in records])

    async def reserve(self, reservation: Reservation) -> BudgetUse | None:
        """Reserve in the account's budget; return what is spent and reserved if it does not fit, otherwise None.

        If the operation fails after it may have taken effect, the error is `uncertain`.
        """
        inserted = False
        lock = {"namespace": budgets.LOCK_NAMESPACE, "account": reservation.account_id}
        try:
            async with self._connection(RESERVATION_SECONDS) as connection, connection.begin():
                await connection.execute(sa.text(budgets.LOCK_ACCOUNT), lock)
                use = await _budget_use(connection, reservation.account_id, reservation.month)
                if not reservation.fits(use):
                    return use
                inserted = True
                await connection.execute(sa.text(budgets.INSERT), budgets.insert_parameters(reservation))
        except StoreUnavailable as error:
            error.uncertain = inserted
            raise
        return None

    async def release(self, request_id: str) -> None:
        """Delete a reservation, if it exists."""
        async with self._connection(RESERVATION_SECONDS) as connection, connection.begin():
            await connection.execute(sa.text(budgets.DELETE), {"request_id": request_id})

    async def budget_use(self, account_id: str, month: Month) -> BudgetUse:
        """Return what the account has spent and reserved in a month."""
        async with self._connection(RESERVATION_SECONDS) as connection:
            return await _budget_use(connection, account_id, month)

    async def connect(self) -> None:
        """Connect, to find out whether the database accepts this server; its schema may be missing."""
        async with self._connection() as connection:
            await connection.execute(sa.select(1))

    async def ping(self) -> None:
        """Read at most one record, to find out whether the store answers."""
        async with self._connection() as connection:
            await connection.execute(sa.select(usage_records.c.request_id).limit(1))

    async def totals(self, account_id: str | None, since: date | None, until: date | None) -> list[DailyUsage]:
        """Return usage by account, day in UTC and model, in this order; both days are included, None means no limit."""
        query, parameters = select_totals(account_id, since, until)
        async with self._connection() as connection:
            return [daily_usage(tuple(row)) for row in await connection.execute(sa.text(query), parameters)]

    async def wrong_totals(self, *, repair: bool) -> tuple[list[DailyUsage], list[DailyUsage]]:
        """Return the stored totals that differ from the records, and the totals of the records in their place.

        With `repair`, replace the stored totals by the totals of the records; servers wait in the meantime.
        """
        query, _ = select_totals(None, None, None)
        async with self._connection() as connection:
            snapshot = await connection.execution_options(isolation_level="REPEATABLE READ")
            async with snapshot.begin():
                if repair:
                    await snapshot.exec_driver_sql("LOCK TABLE usage_records IN SHARE ROW EXCLUSIVE MODE")
                stored = {daily_usage(tuple(row)) for row in await snapshot.execute(sa.text(query))}
                summed = {daily_usage(tuple(row)) for row in await snapshot.execute(sa.text(SUMMED_TOTALS))}
                if repair and stored != summed:
                    for statement in REBUILD_TOTALS:
                        await snapshot.exec_driver_sql(statement)
        return list(stored - summed), list(summed - stored)

    async def close(self) -> None:
        """Close all connections."""
        await self.keys.close()
        await self._engine.dispose()

    def _connection(self, timeout_seconds: float = OPERATION_SECONDS) -> AbstractAsyncContextManager[AsyncConnection]:
        return connected(self._engine, timeout_seconds)


async def _budget_use(connection: AsyncConnection, account_id: str, month: Month) -> BudgetUse:
    result = await connection.execute(sa.text(budgets.SELECT_USE), budgets.use_parameters(account_id, month))
    return budgets.use_of(tuple(result.one()))


class StoreState:
    """The outcome of the last operation on the store; each change is logged once."""

    def __init__(self) -> None:
        self.up = True
        """Whether the last operation succeeded."""

    def record_failure(self, error: Exception) -> None:
        """Record that an operation failed."""
        if self.up:
            reason = str(error) or type(error).__name__
            logger.warning("the usage store is unavailable, records wait on this server's disk: %s", reason)
        self.up = False

    def record_success(self) -> None:
        """Record that an operation succeeded."""
        if not self.up:
            logger.warning("the usage store is available again")
        self.up = True


def _alembic_lock() -> asyncio.Lock:
    return _migration_locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())
