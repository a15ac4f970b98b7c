"""SQLAlchemy engines for the URLs of usage stores."""

import os
from contextlib import suppress
from typing import Any

from sqlalchemy import URL, event, make_url
from sqlalchemy.engine import Connection
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from llama2_server.usage.errors import LedgerError

READ_ONLY = "llama2_read_only"
"""Execution option of a connection that never writes."""
CONNECT_SECONDS = 5
STATEMENT_SECONDS = 10
ENGINE_OPTIONS: dict[str, Any] = {
    "pool_size": 4,
    "max_overflow": 0,
    "pool_timeout": STATEMENT_SECONDS,
    "hide_parameters": True,
}


def create_engine(url: str) -> AsyncEngine:
    """Return an engine for `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/DATABASE`, without connecting.

    Raises:
        LedgerError: the URL is not supported, or its driver is not installed.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise LedgerError(_unsupported("not a valid URL")) from None  # the cause may contain the password
    match parsed.drivername:
        case "sqlite":
            return _sqlite(parsed)
        case "postgresql" | "postgres":
            return _postgresql(url)
        case other:
            raise LedgerError(_unsupported(f"{other} is not supported"))


def _unsupported(problem: str) -> str:
    return f"--usage-url: {problem}; use sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"


def _sqlite(url: URL) -> AsyncEngine:
    if url.database in (None, "", ":memory:"):
        raise LedgerError("--usage-url: a ledger in memory is not durable; name a file, such as sqlite:///usage.db")
    engine = create_async_engine(url.set(drivername="sqlite+aiosqlite"), **ENGINE_OPTIONS)

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, _: object) -> None:
        connection.isolation_level = None  # otherwise the driver starts transactions itself
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {CONNECT_SECONDS * 1000}")
        cursor.execute("PRAGMA journal_mode = WAL")  # readers and the writer do not block each other
        # NORMAL may lose the last commits in a power failure, and the journal drops committed records.
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.close()

    @event.listens_for(engine.sync_engine, "do_connect")
    def create_private(*_: object) -> None:
        # SQLite itself would create the file readable for all; its other files get the same permissions.
        with suppress(OSError):  # SQLite reports the error
            os.close(os.open(str(url.database), os.O_RDWR | os.O_CREAT, 0o600))

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads before it writes fails if another one writes in between.
        read_only = connection.get_execution_options().get(READ_ONLY, False)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def _postgresql(url: str) -> AsyncEngine:
    try:
        import asyncpg  # late: an optional extra
    except ImportError as error:
        raise LedgerError(
            "--usage-url: PostgreSQL needs the postgresql extra; run pip install '.[postgresql]' in the clone"
        ) from error

    async def connect() -> Any:
        # The driver parses the whole URL, so that sslmode, sockets and several hosts work as in libpq.
        return await asyncpg.connect(
            url,
            timeout=CONNECT_SECONDS,
            command_timeout=STATEMENT_SECONDS,
            server_settings={"application_name": "llama2-server"},
        )

    return create_async_engine("postgresql+asyncpg://", async_creator=connect, pool_pre_ping=True, **ENGINE_OPTIONS)
