"""Ledgers on real stores: SQLite files, and databases of a private PostgreSQL cluster."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.support.servers.postgres_server import PostgresCluster

from llama2_server.usage.database import READ_ONLY, create_engine
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.records import UsageRecord
from llama2_server.usage.schema import usage_records
from llama2_server.usage.store import Store

COSTS = {"input_tokens": Decimal("0.3672"), "output_tokens": Decimal("0.000000001")}
RECOVERY_TIMEOUT_SECONDS = 20.0
LedgerOpener = Callable[..., Awaitable[Ledger]]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'usage.db'}"
    cluster: PostgresCluster = request.getfixturevalue("postgres")
    return cluster.new_database()


@pytest.fixture
async def open_ledger(tmp_path: Path) -> AsyncIterator[LedgerOpener]:
    """Return a function that opens ledgers, by default in `tmp_path`; crash the open ones after the test."""
    ledgers = []

    async def open_one(**options: object) -> Ledger:
        url = options.pop("url", None)
        store = None if url is None else Store(str(url))
        arguments: dict[str, object] = {"data_directory": tmp_path, "neuron_costs": COSTS, "store": store, **options}
        ledger = await Ledger.open(**arguments)  # type: ignore[arg-type]
        ledgers.append(ledger)
        return ledger

    yield open_one
    for ledger in ledgers:
        if ledger._tasks:
            await crash(ledger)


async def crash(ledger: Ledger) -> None:
    """Leave the ledger like SIGKILL: unchanged files, released locks, nothing flushed."""
    for task in ledger._tasks:
        task.cancel()
    await asyncio.gather(*ledger._tasks, return_exceptions=True)
    ledger._tasks.clear()
    ledger._journal._segments.release(remove=False)
    await ledger._store.close()


async def stored(url: str) -> list[UsageRecord]:
    """Return all records of a store."""
    engine = create_engine(url)
    columns = [column.label(column.key) for column in usage_records.c if column.key != "day"]
    async with engine.connect() as connection:
        await connection.execution_options(**{READ_ONLY: True})
        rows = (await connection.execute(sa.select(*columns))).mappings().all()
    await engine.dispose()
    return [UsageRecord(**row) for row in rows]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a SQLite file against other writers for the body of the `with`."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    yield
    connection.execute("ROLLBACK")
    connection.close()
