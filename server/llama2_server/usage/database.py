"""SQLAlchemy engines for the URLs of usage stores."""

from typing import Any

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from llama2_server.usage.errors import LedgerError

CONNECT_SECONDS = 5
STATEMENT_SECONDS = 10
ENGINE_OPTIONS: dict[str, Any] = {
    "pool_size": 4,
    "max_overflow": 0,
    "pool_timeout": STATEMENT_SECONDS,
    "hide_parameters": True,
}


def create_engine(url: str) -> AsyncEngine:
    """Return an engine for `postgresql://USER:PASSWORD@HOST/DATABASE`, without connecting.

    Raises:
        LedgerError: the URL is not supported, or its driver is not installed.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise LedgerError(_unsupported("not a valid URL")) from None  # the cause may contain the password
    if parsed.drivername not in ("postgresql", "postgres"):
        raise LedgerError(_unsupported(f"{parsed.drivername} is not supported"))
    return _postgresql(url)


def _unsupported(problem: str) -> str:
    return f"--usage-url: {problem}; use postgresql://USER:PASSWORD@HOST/DATABASE, or no URL for a local file"


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
