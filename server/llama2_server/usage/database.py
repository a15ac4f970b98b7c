"""A store's URL, as operators write it, to SQLAlchemy's engine for it."""

from typing import Any

from sqlalchemy import URL, event, make_url
from sqlalchemy.engine import Connection
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from llama2_server.usage.errors import LedgerError

READ_ONLY = "llama2_read_only"
"""The execution option of a connection that never writes."""
CONNECT_SECONDS = 5
STATEMENT_SECONDS = 10
OPTIONS: dict[str, Any] = {
    "pool_size": 4,
    "max_overflow": 0,
    "pool_timeout": STATEMENT_SECONDS,
    "hide_parameters": True,
}


def create_engine(url: str) -> AsyncEngine:
    """The engine of `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/DATABASE`; it connects when it is used.

    Raises:
        LedgerError: the URL is not one of these, or its driver is not installed.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise LedgerError(_expected("it is not a URL")) from None  # the cause may quote the password
    match parsed.drivername:
        case "sqlite":
            return _sqlite(parsed)
        case "postgresql" | "postgres":
            return _postgresql(url)
        case other:
            raise LedgerError(_expected(f"{other} is none of them"))


def _expected(problem: str) -> str:
    return f"usage_url: must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE; {problem}"


def _sqlite(url: URL) -> AsyncEngine:
    if url.database in (None, "", ":memory:"):
        raise LedgerError("usage_url: a ledger in memory would not be durable; name a file, as in sqlite:///usage.db")
    engine = create_async_engine(url.set(drivername="sqlite+aiosqlite"), **OPTIONS)

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver begins no transactions of its own
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {CONNECT_SECONDS * 1000}")
        cursor.execute("PRAGMA journal_mode = WAL")  # readers and the writer never wait for each other
        # NORMAL may lose the last commits in a power failure, and the journal forgets what was committed.
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer that waits for its turn before it has read anything is never refused for having read too early.
        read_only = connection.get_execution_options().get(READ_ONLY, False)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def _postgresql(url: str) -> AsyncEngine:
    try:
        import asyncpg  # late: an optional extra
    except ImportError as error:
        raise LedgerError("usage_url: PostgreSQL needs an extra: pip install 'llama2-grpc[postgresql]'") from error

    async def connect() -> Any:
        # The driver reads the whole URL by itself: sslmode, sockets and several hosts work as libpq's users expect.
        return await asyncpg.connect(
            url,
            timeout=CONNECT_SECONDS,
            command_timeout=STATEMENT_SECONDS,
            server_settings={"application_name": "llama2-server"},
        )

    return create_async_engine("postgresql+asyncpg://", async_creator=connect, pool_pre_ping=True, **OPTIONS)
