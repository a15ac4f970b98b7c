"""The idempotency keys of all servers in the usage store. Each method is one statement, which commits by itself."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from llama2_server.usage.database import connected, create_engine, is_disconnected
from llama2_server.usage.errors import StoreUnavailable
from llama2_server.usage.keys.records import HeldKey, KeyRecord
from llama2_server.usage.keys.statements import COLUMNS, record_of
from llama2_server.usage.keys.store_statements import POSTGRESQL_NOW, Statements, parameters_of

HOLD_SECONDS = 5.0
"""How long a server that has ended without a release holds a key."""
OPERATION_SECONDS = 2.0  # a call waits for it

Row = tuple[Any, ...]


class KeyStore(ABC):
    """The keys; every method except `close` raises StoreUnavailable if the store does not answer.

    `server` is the name of the calling server, and `now` the time.
    """

    def __init__(self, clock: str) -> None:
        """`clock` is the expression of the store's time, in milliseconds since 1970."""
        self._statements = Statements.at(clock)

    async def claim(self, record: KeyRecord, server: str, now: datetime) -> HeldKey:
        """Insert a key, or merge it into the stored one; hold it if no other server does, and return it."""
        parameters = parameters_of(record) | _holder(server, holds=True) | {"server": server, "now": now}
        rows = await self._execute(self._statements.claim, [parameters], returns=True)
        return _held_key(rows[0])

    async def find(self, digest: str, server: str, now: datetime) -> HeldKey | None:
        """Return a key, and hold it if no other server does; None if it is unknown or expired."""
        parameters = {"digest": digest, "server": server, "now": now, "hold_ms": _HOLD_MS}
        rows = await self._execute(self._statements.find, [parameters], returns=True)
        return _held_key(rows[0]) if rows else None

    async def put(self, records: Sequence[KeyRecord], server: str, now: datetime, *, holds: bool) -> None:
        """Store keys, unless the stored ones have come further; with `holds`, the server continues to hold them."""
        shared = _holder(server, holds=holds) | {"server": server, "now": now}
        await self._execute(self._statements.put, [parameters_of(record) | shared for record in records])

    async def renew(self, server: str) -> dict[str, bool]:
        """Continue to hold the server's keys; return by digest whether another server waits for the key."""
        rows = await self._execute(self._statements.renew, [{"server": server, "hold_ms": _HOLD_MS}], returns=True)
        return {str(digest): bool(wanted) for digest, wanted in rows}

    async def release(self, digest: str, server: str) -> None:
        """End holding a key."""
        await self._execute(self._statements.release, [{"digest": digest, "server": server}])

    async def release_all(self, servers: Sequence[str]) -> None:
        """End holding the keys of servers that have ended."""
        await self._execute(self._statements.release_all, [{"server": server} for server in servers])

    async def withdraw(self, digest: str, request_ids: Collection[str], server: str) -> None:
        """Delete the key of a call that was rejected, which had one of these ids, if the server holds it."""
        shared = {"digest": digest, "server": server}
        await self._execute(self._statements.withdraw, [shared | {"request_id": one} for one in request_ids])

    async def purge(self, now: datetime) -> None:
        """Delete the expired keys."""
        await self._execute(self._statements.purge, [{"now": now}])

    @abstractmethod
    async def close(self) -> None:
        """Close all connections."""

    @abstractmethod
    async def _execute(self, statement: str, parameters: list[dict[str, Any]], *, returns: bool = False) -> list[Row]:
        """Execute a statement with each of the parameters; with `returns`, return its rows."""


class PostgresKeyStore(KeyStore):
    """The keys in PostgreSQL; it connects on first use.

    Raises:
        LedgerError: the URL is not supported, or its driver is not installed.
    """

    def __init__(self, url: str) -> None:
        super().__init__(POSTGRESQL_NOW)
        # Without a check of the connection and without BEGIN and COMMIT, a statement is one round trip.
        engine = create_engine(url, checks_connections=False)
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()

    async def _execute(self, statement: str, parameters: list[dict[str, Any]], *, returns: bool = False) -> list[Row]:
        try:
            return await self._attempt(statement, parameters, returns=returns)
        except StoreUnavailable as error:
            # Each statement can be repeated. All pooled connections are as old as the broken one.
            if not is_disconnected(error):
                raise
        return await self._attempt(statement, parameters, returns=returns)

    async def _attempt(self, statement: str, parameters: list[dict[str, Any]], *, returns: bool) -> list[Row]:
        async with connected(self._engine, OPERATION_SECONDS) as connection:
            if not returns:
                await connection.execute(sa.text(statement), parameters)
                return []
            result = await connection.execute(sa.text(statement), parameters[0])
            return [tuple(row) for row in result]


_HOLD_MS = round(HOLD_SECONDS * 1000)


def _holder(server: str, *, holds: bool) -> dict[str, Any]:
    return {"holder": server if holds else "", "hold_ms": _HOLD_MS if holds else 0}


def _held_key(row: Row) -> HeldKey:
    return HeldKey(record_of(row[: len(COLUMNS)]), str(row[len(COLUMNS)]))
