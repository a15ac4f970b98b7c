"""SQLAlchemy engines for the URLs of usage stores."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from llama2_server.usage.errors import LedgerError, NewerSchema, StoreUnavailable

CONNECT_SECONDS = 5
STATEMENT_SECONDS = 10
ENGINE_OPTIONS: dict[str, Any] = {
    "pool_size": 4,
    "max_overflow": 0,
    "pool_timeout": STATEMENT_SECONDS,
    "hide_parameters": True,
}


def create_engine(url: str, *, checks_connections: bool = True) -> AsyncEngine:
    """Return an engine for `postgresql://USER:PASSWORD@HOST/DATABASE`, without connecting.

    With `checks_connections`, it checks each connection before its use, which costs a round trip.

    Raises:
        LedgerError: the URL is not supported, or its driver is not installed.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise LedgerError(_unsupported("not a valid URL")) from None  # the cause may contain the password
    if parsed.drivername not in ("postgresql", "postgres"):
        raise LedgerError(_unsupported(f"{parsed.drivername} is not supported"))
    return _postgresql(url, checks_connections=checks_connections)


@asynccontextmanager
async def connected(engine: AsyncEngine, timeout_seconds: float) -> AsyncIterator[AsyncConnection]:
    """Connect for one operation of at most this time, and translate the exceptions of the drivers.

    Raises:
        StoreUnavailable: the operation failed.
        NewerSchema: a newer version of this service has migrated the database.
    """
    try:
        async with asyncio.timeout(timeout_seconds), engine.connect() as connection:
            yield connection
    except NewerSchema:
        raise
    except Exception as error:  # the exceptions of the drivers have no common base
        cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        sqlstate = str(getattr(cause, "sqlstate", None) or "")
        raise StoreUnavailable(_reason(cause), temporary=_is_temporary(cause, sqlstate), sqlstate=sqlstate) from error


def is_disconnected(error: StoreUnavailable) -> bool:
    """Return whether an operation failed because its connection was closed; a new one may work."""
    return isinstance(error.__cause__, DBAPIError) and error.__cause__.connection_invalidated


def _reason(cause: BaseException) -> str:
    """Return one line for the log; drivers include hosts and users, but never passwords."""
    text = str(cause).partition("\n")[0]
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__


def _is_temporary(cause: BaseException, sqlstate: str) -> bool:
    # PostgreSQL's classes: connection failures, too many connections, starting up or shutting down.
    return isinstance(cause, OSError | TimeoutError | sa.exc.TimeoutError) or sqlstate.startswith(("08", "53", "57"))


def _unsupported(problem: str) -> str:
    return f"--usage-url: {problem}; use postgresql://USER:PASSWORD@HOST/DATABASE, or no URL for a local file"


def _postgresql(url: str, *, checks_connections: bool) -> AsyncEngine:
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

    options = ENGINE_OPTIONS | {"pool_pre_ping": checks_connections}
    return create_async_engine("postgresql+asyncpg://", async_creator=connect, **options)
