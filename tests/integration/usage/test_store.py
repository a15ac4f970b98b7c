"""SQLite and PostgreSQL store the same records, add them up exactly, and migrate automatically."""

import asyncio
import os
import random
import sqlite3
import subprocess
import sys
from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from tests.integration.usage.conftest import LedgerOpener, stored

from llama2_server.usage.database import create_engine
from llama2_server.usage.errors import LedgerError, StoreUnavailable
from llama2_server.usage.records import DailyUsage, UsageRecord
from llama2_server.usage.schema import METADATA
from llama2_server.usage.store import VERSION_TABLE, Store

MIDNIGHT = datetime(2026, 3, 1, tzinfo=UTC)


def record(request_id: str, **changes: object) -> UsageRecord:
    values: dict[str, object] = {
        "account_id": "acme",
        "model": "model",
        "started_at": MIDNIGHT,
        "finished_at": MIDNIGHT + timedelta(seconds=2, microseconds=3),
        "input_tokens": 7,
        "output_tokens": 11,
        "cached": False,
        "neurons": Decimal("6.6096"),
        "outcome": "MAX_TOKENS",
        **changes,
    }
    return UsageRecord(request_id=request_id, **values)  # type: ignore[arg-type]


def expected_totals(records: list[UsageRecord], account: str) -> list[DailyUsage]:
    groups: dict[tuple[date, str], list[UsageRecord]] = defaultdict(list)
    for one in records:
        if one.account_id == account:
            groups[one.started_at.date(), one.model].append(one)
    return [
        DailyUsage(
            account,
            day,
            model,
            len(group),
            sum(one.cached for one in group),
            sum(one.input_tokens for one in group if not one.cached),
            sum(one.output_tokens for one in group if not one.cached),
            sum(one.input_tokens for one in group if one.cached),
            sum(one.output_tokens for one in group if one.cached),
            sum((one.neurons for one in group), Decimal(0)),
        )
        for (day, model), group in sorted(groups.items())
    ]


async def test_records_are_read_as_written(url: str) -> None:
    """Records keep microseconds, all digits of neurons and Unicode text; a second insert changes nothing."""
    store = Store(url)
    await store.migrate()
    records = [
        record("plain"),
        record("cached", cached=True, neurons=Decimal(0), account_id="münchen 🦙"),
        record("large", input_tokens=2**40, neurons=Decimal("9000000000.000000001")),
    ]
    await store.insert(records)
    await store.insert([record("plain", outcome="INTERRUPTED"), record("later")])
    await store.close()
    found = {one.request_id: one for one in await stored(url)}
    assert found == {one.request_id: one for one in [*records, record("later")]}


@pytest.mark.parametrize("seed", range(3))
async def test_totals_are_exact(url: str, seed: int) -> None:
    """Sums by day in UTC and model equal exact arithmetic to the last digit, for any prices."""
    draw = random.Random(seed)
    records = [
        record(
            f"{number}",
            account_id=draw.choice(["acme", "other"]),
            model=draw.choice(["a", "b"]),
            started_at=MIDNIGHT + timedelta(microseconds=draw.choice([-1, 0, 1]) + draw.randrange(3) * 86_400_000_000),
            finished_at=MIDNIGHT + timedelta(days=9),
            input_tokens=draw.randrange(3000),
            output_tokens=draw.randrange(2500),
            cached=(cached := draw.random() < 0.2),
            neurons=Decimal(0) if cached else Decimal(draw.randrange(10**15)).scaleb(-9),
        )
        for number in range(500)
    ]
    store = Store(url)
    await store.migrate()
    await store.insert(records)
    expected = expected_totals(records, "acme")
    assert len(expected) == 8
    assert await store.totals("acme", None, None) == expected
    since, until = expected[2].day, expected[-3].day
    assert await store.totals("acme", since, until) == [total for total in expected if since <= total.day <= until]
    assert await store.totals(None, None, None) == [*expected, *expected_totals(records, "other")]
    assert await store.totals("unknown", None, None) == []
    await store.close()


async def test_batch_is_atomic(url: str) -> None:
    """An invalid record rolls back its whole batch, and raises StoreUnavailable."""
    store = Store(url)
    await store.migrate()
    with pytest.raises(StoreUnavailable):
        await store.insert([record("good"), record("bad", outcome=None)])
    await store.close()
    assert await stored(url) == []


async def test_migrations_create_the_schema(url: str) -> None:
    """The migrated schema equals the declared one, and a second start changes nothing."""
    for _ in range(2):
        store = Store(url)
        await store.migrate()
        await store.migrate()
        async with store._engine.connect() as connection:
            assert await connection.run_sync(_differences) == []
        await store.close()


def _differences(connection: sa.Connection) -> list[object]:
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
    return list(compare_metadata(context, METADATA))


async def test_newer_schema_is_rejected(url: str) -> None:
    """A store that a newer version has migrated is rejected."""
    store = Store(url)
    await store.migrate()
    async with store._engine.begin() as connection:
        await connection.execute(sa.table(VERSION_TABLE, sa.column("version_num")).update().values(version_num="9999"))
    with pytest.raises(LedgerError, match="newer version"):
        await store.migrate()
    await store.close()


def test_servers_that_start_together_migrate_once(url: str) -> None:
    """Several processes start on one empty store, and all of them succeed."""
    program = (
        "import asyncio, sys\n"
        "from llama2_server.usage.ledger import read_totals\n"
        "sys.stdin.readline()\n"
        "asyncio.run(read_totals(sys.argv[1]))\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, url], stdin=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        assert process.stdin
        process.stdin.close()
    assert [process.wait() for process in processes] == [0, 0, 0]


async def test_stores_migrate_at_the_same_time(tmp_path: Path) -> None:
    """Several stores of one process can migrate at the same time."""
    stores = [Store(f"sqlite:///{tmp_path / f'{number}.db'}") for number in range(4)]
    await asyncio.gather(*(store.migrate() for store in stores))
    for store in stores:
        assert await store.totals(None, None, None) == []
        await store.close()


async def test_sqlite_is_durable_and_shared(tmp_path: Path) -> None:
    """SQLite uses write-ahead logging, and syncs every commit."""
    store = Store(f"sqlite:///{tmp_path / 'usage.db'}")
    await store.migrate()
    async with store._engine.connect() as connection:
        assert (await connection.exec_driver_sql("PRAGMA synchronous")).scalar_one() == 2  # FULL
    with sqlite3.connect(tmp_path / "usage.db") as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()
    await store.close()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("usage.db", "not a valid URL"),
        ("mysql://root:s3cret@host/db", "mysql is not supported"),
        ("postgresql://u:s3cret@host:port/db", "not a valid URL"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
    ],
)
def test_invalid_url_is_rejected(wrong: str, message: str) -> None:
    """The error is one line with the setting and the problem, without the password."""
    with pytest.raises(LedgerError, match=f"^--usage-url: .*{message}") as caught:
        create_engine(wrong)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_postgresql_without_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra to install."""
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(LedgerError, match=r"llama2-grpc\[postgresql\]"):
        create_engine("postgres://host/db")


@pytest.mark.parametrize("scheme", ["postgres", "postgresql"])
async def test_refused_connection_is_temporary(scheme: str) -> None:
    """A refused connection is a temporary error, and its reason does not contain the password."""
    store = Store(f"{scheme}://user:s3cret@127.0.0.1:1/db?sslmode=prefer")
    with pytest.raises(StoreUnavailable) as caught:
        await store.migrate()
    assert caught.value.temporary
    assert "s3cret" not in str(caught.value)
    await store.close()


async def test_sqlite_files_are_private(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """The database and its other files can be read by their owner only, with the usual umask."""
    previous = os.umask(0o022)
    try:
        await open_ledger()
    finally:
        os.umask(previous)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.glob("usage.db*")}
    assert "usage.db" in modes
    assert set(modes.values()) == {"0o600"}, modes
