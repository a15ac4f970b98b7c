"""The usage store: a table in SQLite or PostgreSQL, through SQLAlchemy's asyncio engines."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, date
from importlib import resources
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from llama2_server.usage.database import READ_ONLY, STATEMENT_SECONDS, create_engine
from llama2_server.usage.errors import LedgerError, StoreUnavailable
from llama2_server.usage.records import DailyUsage, UsageRecord
from llama2_server.usage.schema import usage_records

VERSION_TABLE = "llama2_usage_version"
# A fixed number of this project: servers that start at the same time migrate one after the other.
ADVISORY_LOCK = 0x11A3A2
OPERATION_SECONDS = STATEMENT_SECONDS + 5
# Alembic keeps its context in module globals, so an event loop runs one migration at a time.
_alembic_locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


class Store:
    """A database of usage records; it connects on first use.

    Every method except `close` raises StoreUnavailable if the database operation fails.

    Raises:
        LedgerError: the URL is not supported, or its driver is not installed.
    """

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url)
        insert = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert
        self._insert = insert(usage_records).on_conflict_do_nothing(index_elements=["request_id"])

    async def migrate(self) -> None:
        """Migrate the schema to the current version, if necessary.

        Raises:
            LedgerError: a newer version of this service has migrated the store.
        """
        try:
            async with self._connection() as connection, _alembic_lock(), connection.begin():
                await connection.run_sync(_upgrade)
        except CommandError as error:
            raise LedgerError(
                "--usage-url: a newer version of llama2-server has migrated the store; use that version"
            ) from error

    async def insert(self, records: Sequence[UsageRecord]) -> None:
        """Insert all records or none; existing records do not change."""
        rows = [_row(record) for record in records]
        async with self._connection() as connection, connection.begin():
            await connection.execute(self._insert, rows)

    async def connect(self) -> None:
        """Connect, to find out whether the database accepts this server; its schema may be missing."""
        async with self._connection() as connection:
            await (await connection.execution_options(**{READ_ONLY: True})).execute(sa.select(1))

    async def ping(self) -> None:
        """Read at most one record, to find out whether the store answers."""
        async with self._connection() as connection:
            reader = await connection.execution_options(**{READ_ONLY: True})
            await reader.execute(sa.select(usage_records.c.request_id).limit(1))

    async def totals(self, account_id: str | None, since: date | None, until: date | None) -> list[DailyUsage]:
        """Return usage by account, day in UTC and model, in this order; both days are included, None means no limit."""
        query = _totals(account_id, since, until)
        async with self._connection() as connection:
            result = await (await connection.execution_options(**{READ_ONLY: True})).execute(query)
            return [DailyUsage(**{**row._mapping, **_integers(row._mapping)}) for row in result]

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[AsyncConnection]:
        """Connect for one operation, and translate exceptions of the drivers to StoreUnavailable."""
        try:
            async with asyncio.timeout(OPERATION_SECONDS), self._engine.connect() as connection:
                yield connection
        except CommandError:
            raise
        except Exception as error:  # the exceptions of the drivers have no common base
            cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
            raise StoreUnavailable(_reason(cause), temporary=_is_temporary(cause)) from error


def _alembic_lock() -> asyncio.Lock:
    return _alembic_locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())


def _upgrade(connection: sa.Connection) -> None:
    if connection.dialect.name == "postgresql":  # in SQLite, the transaction has already locked the file
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})")
    config = Config()
    scripts = str(resources.files("llama2_server") / "usage" / "migrations")
    config.set_main_option("script_location", scripts.replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _row(record: UsageRecord) -> dict[str, Any]:
    return {**asdict(record), "day": record.started_at.astimezone(UTC).date()}


def _totals(account_id: str | None, since: date | None, until: date | None) -> sa.Select[Any]:
    table = usage_records.c
    keys = (table.account_id, table.day, table.model)
    query = sa.select(
        *(column.label(column.key) for column in keys),
        sa.func.count().label("requests"),
        _sum_where(table.cached, sa.literal(1)).label("cached_requests"),
        _sum_where(~table.cached, table.input_tokens).label("input_tokens"),
        _sum_where(~table.cached, table.output_tokens).label("output_tokens"),
        _sum_where(table.cached, table.input_tokens).label("cached_input_tokens"),
        _sum_where(table.cached, table.output_tokens).label("cached_output_tokens"),
        sa.func.sum(table.neurons).label("neurons"),
    )
    for condition in (
        account_id is None or table.account_id == account_id,
        since is None or table.day >= since,
        until is None or table.day <= until,
    ):
        query = query.where(condition) if condition is not True else query
    return query.group_by(*keys).order_by(*keys)


def _sum_where(condition: sa.ColumnElement[bool], value: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
    return sa.func.sum(sa.case((condition, value), else_=0))


def _integers(row: Any) -> dict[str, int]:
    """Return the counts as integers, because PostgreSQL's sums of big integers are decimals."""
    return {name: int(value) for name, value in row.items() if name.endswith(("_tokens", "requests"))}


def _reason(cause: BaseException) -> str:
    """Return one line for the log; drivers include hosts and users, but never passwords."""
    text = str(cause).partition("\n")[0]
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__


def _is_temporary(cause: BaseException) -> bool:
    if isinstance(cause, OSError | TimeoutError | sa.exc.TimeoutError) or "database is locked" in str(cause):
        return True
    # PostgreSQL: connection failures, too many connections, starting up or shutting down.
    return str(getattr(cause, "sqlstate", "")).startswith(("08", "53", "57"))
