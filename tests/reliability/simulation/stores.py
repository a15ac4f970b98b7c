"""The stores that the simulated replicas share: a usage store with the real statements, and a Redis for quotas."""

import asyncio
import random
import sqlite3
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, date, datetime
from typing import Any

import sqlalchemy as sa
from redis.exceptions import ConnectionError as RedisConnectionError
from tests.support.simulated.threads import Process

from llama2_server.usage.errors import StoreUnavailable
from llama2_server.usage.keys.key_store import KeyStore
from llama2_server.usage.local import statements
from llama2_server.usage.migrations import upgrade
from llama2_server.usage.records import DailyUsage, UsageRecord
from llama2_server.usage.store import Store

LATE_SECONDS = 20.0


class UsageDatabase:
    """The usage store of all replicas: SQLite in memory, because both databases run the same statements."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.up = True
        self.loses_replies = False
        self.poisoned: str | None = None
        """The account whose records the store rejects."""
        engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
        with engine.begin() as migrating:
            upgrade(migrating)
        self._engine = engine
        driver_connection = engine.raw_connection().driver_connection
        assert isinstance(driver_connection, sqlite3.Connection)
        self.connection: sqlite3.Connection = driver_connection
        self.connection.isolation_level = None

    def write(self, records: Sequence[UsageRecord]) -> None:
        """Write records in any order, in one transaction."""
        shuffled = self.draw.sample(records, len(records))
        self.connection.execute("BEGIN")
        for record in shuffled:
            statements.upsert(self.connection, record)
        self.connection.execute("COMMIT")

    def close(self) -> None:
        """Delete the database."""
        self._engine.dispose()
        self.connection.close()


class SimulatedStore(Store):
    """One replica's connection to the usage store; requests and replies get lost, repeated and late."""

    def __init__(self, database: UsageDatabase, process: Process) -> None:
        self._database = database
        self._process = process
        self.keys = SimulatedKeyStore(database, self.answer)

    async def migrate(self) -> None:
        """Check that the store answers."""
        await self.answer()

    async def connect(self) -> None:
        """Check that the store answers."""
        await self.answer()

    async def ping(self) -> None:
        """Check that the store answers."""
        await self.answer()

    async def upsert(self, records: Sequence[UsageRecord]) -> None:
        """Write the records, some of them again later; a part of the replies is lost."""
        await self.answer()
        database, draw = self._database, self._database.draw
        if any(record.account_id == database.poisoned for record in records):
            raise StoreUnavailable("a character is not allowed", temporary=False, sqlstate="22021")
        database.write(records)
        if draw.random() < 0.2:  # a repeated transmission of the same batch arrives later
            loop = asyncio.get_running_loop()
            loop.call_later(draw.uniform(0, LATE_SECONDS), database.write, records)
        await asyncio.sleep(draw.uniform(0, 0.01))
        if database.loses_replies and draw.random() < 0.5:
            raise StoreUnavailable("the connection was closed", temporary=True, sqlstate="08006")

    async def totals(self, account_id: str | None, since: date | None, until: date | None) -> list[DailyUsage]:
        """Return the totals."""
        await self.answer()
        return statements.totals(self._database.connection, account_id, since, until)

    async def close(self) -> None:
        """Do nothing."""

    async def answer(self) -> None:
        """Wait as long as the network takes; fail during an outage."""
        await asyncio.sleep(self._database.draw.uniform(0, 0.01))
        if not self._process.alive:
            await asyncio.Event().wait()
        if not self._database.up:
            raise StoreUnavailable("connection refused", temporary=True)


class SimulatedKeyStore(KeyStore):
    """One replica's connection to the keys of the usage store; statements and their results get lost and late."""

    def __init__(self, database: UsageDatabase, answer: Callable[[], Awaitable[None]]) -> None:
        super().__init__(":now_ms")
        self._database = database
        self._answer = answer

    async def close(self) -> None:
        """Do nothing."""

    async def _execute(
        self, statement: str, parameters: list[dict[str, Any]], *, returns: bool = False
    ) -> list[tuple[Any, ...]]:
        await self._answer()
        database, rows = self._database, []
        for values in parameters:
            rows = database.connection.execute(statement, for_sqlite(values)).fetchall()
        await asyncio.sleep(database.draw.uniform(0, 0.01))
        if database.loses_replies and database.draw.random() < 0.5:
            raise StoreUnavailable("the connection was closed", temporary=True, sqlstate="08006")
        return rows if returns else []


def for_sqlite(values: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a statement with times as SQLite has them, and the store's time."""
    now_ms = round(asyncio.get_running_loop().time() * 1000)
    return {
        name: value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
        if isinstance(value, datetime)
        else value
        for name, value in values.items()
    } | {"now_ms": now_ms}


class RedisState:
    """The data of the simulated Redis, and whether it answers."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.up = True
        self.slow = False
        self.windows: defaultdict[str, list[int]] = defaultdict(list)  # newest first, in microseconds
        self.values: dict[str, tuple[bytes, float]] = {}


class SimulatedRedis:
    """Stands for redis.asyncio.Redis: the commands that the service uses."""

    state: RedisState

    def __init__(self, connection_pool: Any) -> None:
        self.connection_pool = connection_pool

    async def ping(self) -> bool:
        """Answer."""
        await self._answer()
        return True

    def register_script(self, script: str) -> Callable[..., Any]:
        """Return the script of the quota windows, in Python."""
        return self._use_window

    async def execute_command(self, name: str, key: str, *arguments: Any) -> bytes | None:
        """Run GET, or SET with an expiry in milliseconds."""
        await self._answer()
        now = asyncio.get_running_loop().time()
        if name == "SET":
            self.state.values[key] = (arguments[0], now + arguments[2] / 1000)
            return b"OK"
        value, expires_at = self.state.values.get(key, (None, 0.0))
        return value if expires_at > now else None

    async def aclose(self) -> None:
        """Do nothing."""

    async def _answer(self) -> None:
        state = self.state
        await asyncio.sleep(state.draw.uniform(0, 0.3) if state.slow else state.draw.uniform(0, 0.002))
        if not state.up:
            raise RedisConnectionError

    async def _use_window(self, keys: list[str], args: list[Any]) -> list[int]:
        await self._answer()
        limit, window, operation, consumed_at, *expected_in = args
        now = round(asyncio.get_running_loop().time() * 1e6)
        times = self.state.windows[keys[0]]
        while times and times[-1] + window <= now:
            times.pop()
        if operation == "refund" and consumed_at in times:
            times.remove(consumed_at)
        left = [
            sum(at + window - now <= expected for at in times) - number
            for number, expected in enumerate(expected_in, 1)
        ]
        free = limit - len(times) + min([0, *left])
        allowed = operation == "consume" and free > 0
        if allowed:
            times.insert(0, now)
        retry_in = times[limit - 1] + window - now if len(times) >= limit else 0
        return [int(allowed), max(0, free - allowed), retry_in, times[0] + window - now if times else 0, now]
