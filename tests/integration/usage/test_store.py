"""The local database and PostgreSQL have the same records, add them up exactly, and migrate automatically."""

import asyncio
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from tests.integration.usage.databases import LocalDatabase, PostgresDatabase, UsageDatabase
from tests.support.servers.postgres_server import PostgresCluster

from llama2_server.usage.database import create_engine
from llama2_server.usage.errors import LedgerError, StoreUnavailable
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.migrations import VERSION_TABLE
from llama2_server.usage.records import INTERRUPTED, DailyUsage, UsageRecord
from llama2_server.usage.store import Store

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


@pytest.fixture
async def database(url: str | None, tmp_path: Path) -> AsyncIterator[UsageDatabase]:
    """An empty database of each kind, with its tables."""
    opened: UsageDatabase = LocalDatabase(tmp_path) if url is None else PostgresDatabase(url)
    await opened.migrate()
    yield opened
    await opened.close()


async def test_records_are_read_as_written(database: UsageDatabase) -> None:
    """Records keep microseconds, all digits of neurons and Unicode text; a repeated record changes nothing."""
    records = [
        record("plain"),
        record("cached", cached=True, neurons=Decimal(0), account_id="münchen 🦙"),
        record("large", input_tokens=2**40, neurons=Decimal("9000000000.000000001")),
    ]
    await database.upsert(records)
    await database.upsert([record("plain", outcome=INTERRUPTED), record("later")])
    assert await database.records() == {one.request_id: one for one in [*records, record("later")]}


@pytest.mark.parametrize("seed", range(3))
async def test_totals_are_exact(database: UsageDatabase, seed: int) -> None:
    """Totals by day in UTC and model equal exact arithmetic to the last digit, for any prices."""
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
    await database.upsert(records)
    expected = expected_totals(records, "acme")
    assert len(expected) == 8
    assert await database.totals("acme", None, None) == expected
    since, until = expected[2].day, expected[-3].day
    assert await database.totals("acme", since, until) == [total for total in expected if since <= total.day <= until]
    assert await database.totals(None, None, None) == [*expected, *expected_totals(records, "other")]
    assert await database.totals("unknown", None, None) == []
    assert await database.wrong_totals(repair=False) == ([], [])


def states(request_id: str, draw: random.Random) -> list[UsageRecord]:
    """Return states of one request: interrupted ones from several takeovers, and the complete one of its server."""
    interrupted = [
        record(
            request_id,
            outcome=INTERRUPTED,
            finished_at=MIDNIGHT + timedelta(seconds=draw.randrange(9)),
            output_tokens=tokens,
            neurons=Decimal(tokens),
        )
        for tokens in (draw.randrange(90), draw.randrange(90))
    ]
    complete = record(
        request_id, outcome=draw.choice(["MAX_TOKENS", "CANCELLED"]), output_tokens=90, neurons=Decimal(90)
    )
    return [*interrupted, complete]


@pytest.mark.parametrize("seed", range(3))
async def test_upserts_in_any_order_end_equal(database: UsageDatabase, seed: int) -> None:
    """Records that arrive shuffled and repeated end as the complete ones: tokens never fall, and totals are exact."""
    draw = random.Random(seed)
    histories = [states(f"{number}", draw) for number in range(40)]
    arrivals = [state for history in histories for state in history for _ in range(2)]
    draw.shuffle(arrivals)
    tokens = dict.fromkeys((f"{number}" for number in range(40)), 0)
    complete = set()
    while arrivals:
        batch = [arrivals.pop() for _ in range(min(len(arrivals), draw.randrange(1, 9)))]
        await database.upsert(batch)
        found = await database.records()
        for one in batch:
            tokens[one.request_id] = max(tokens[one.request_id], one.output_tokens)
            complete |= {one.request_id} if one.outcome != INTERRUPTED else set()
        assert {name: one.output_tokens for name, one in found.items()} == {
            n: t for n, t in tokens.items() if n in found
        }
        assert {name for name, one in found.items() if one.outcome != INTERRUPTED} == complete
    finished = [history[-1] for history in histories]
    assert await database.records() == {one.request_id: one for one in finished}
    assert await database.totals("acme", None, None) == expected_totals(finished, "acme")


async def test_interrupted_records_merge_in_any_order(database: UsageDatabase) -> None:
    """Of two incomplete records of one request, the later end and the larger numbers are kept, in both orders."""
    one = record("x", outcome=INTERRUPTED, finished_at=MIDNIGHT, input_tokens=9, output_tokens=50, neurons=Decimal(5))
    other = record("x", outcome=INTERRUPTED, input_tokens=7, output_tokens=60, neurons=Decimal(6))
    merged = record("x", outcome=INTERRUPTED, input_tokens=9, output_tokens=60, neurons=Decimal(6))
    for order in ([one, other], [other, one], [one, other, one]):
        await database.upsert(order)
        assert await database.records() == {"x": merged}
        assert await database.totals("acme", None, None) == expected_totals([merged], "acme")
        await database.delete("x")
    assert await database.totals("acme", None, None) == []


async def test_wrong_totals_are_found_and_repaired(database: UsageDatabase) -> None:
    """A total that was changed, deleted or invented is reported with the records' total, and repaired."""
    records = [record("a"), record("b", account_id="other"), record("c", account_id="third")]
    await database.upsert(records)
    await database.execute("UPDATE usage_daily_totals SET requests = 7 WHERE account = 'acme'")
    await database.execute("DELETE FROM usage_daily_totals WHERE account = 'other'")
    await database.execute("INSERT INTO usage_daily_totals VALUES ('unknown', '2026-03-01', 'm', 1, 0, 0, 0, 0, 0, 0)")
    stored, summed = await database.wrong_totals(repair=True)
    assert sorted((one.account_id, one.requests) for one in stored) == [("acme", 7), ("unknown", 1)]
    assert sorted((one.account_id, one.requests) for one in summed) == [("acme", 1), ("other", 1)]
    assert await database.wrong_totals(repair=False) == ([], [])
    assert await database.totals(None, None, None) == [
        total for account in ("acme", "other", "third") for total in expected_totals(records, account)
    ]


async def test_batch_is_atomic(postgres: PostgresCluster) -> None:
    """An invalid record rolls back its whole batch, and raises StoreUnavailable with PostgreSQL's code of the error."""
    database = PostgresDatabase(postgres.new_database())
    await database.migrate()
    with pytest.raises(StoreUnavailable) as caught:
        await database.upsert([record("good"), record("bad", account_id="acme\0")])
    assert (caught.value.is_of_the_data, caught.value.temporary) == (True, False)
    assert await database.records() == {}
    await database.close()


async def test_migrations_create_the_schema(database: UsageDatabase) -> None:
    """The migrated schema equals the declared one, and a second start changes nothing."""
    for _ in range(2):
        assert await database.schema_differences() == []
        await database.migrate()


async def test_older_database_is_migrated(database: UsageDatabase) -> None:
    """The records of the first version keep their values, and get totals."""
    await database.upsert([record("a"), record("b", cached=True, neurons=Decimal(0))])
    if isinstance(database, PostgresDatabase):
        await database.execute("DROP TRIGGER usage_records_totals ON usage_records")
        await database.execute("DROP FUNCTION usage_records_totals()")
    else:
        for event in ("insert", "update", "delete"):
            await database.execute(f"DROP TRIGGER usage_records_{event}")
        await database.execute("DROP TABLE running_requests")
        await database.execute("DROP TABLE rejected_records")
        await database.execute("DROP TABLE unsent_keys")
    await database.execute("DROP TABLE idempotency_keys")
    await database.execute("DROP TABLE budget_reservations")
    await database.execute("DROP TABLE usage_daily_totals")
    await database.execute(f"UPDATE {VERSION_TABLE} SET version_num = '0001'")  # noqa: S608 - constant
    await database.migrate()
    assert await database.schema_differences() == []
    assert list(await database.records()) == ["a", "b"]
    assert await database.wrong_totals(repair=False) == ([], [])
    assert [total.requests for total in await database.totals("acme", None, None)] == [2]


async def test_newer_schema_is_rejected(database: UsageDatabase) -> None:
    """A database that a newer version has migrated is rejected."""
    await database.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")  # noqa: S608 - constant
    with pytest.raises(LedgerError, match="newer version"):
        await database.migrate()


def test_servers_that_start_together_migrate_once(tmp_path: Path, url: str | None) -> None:
    """Several processes start on one empty store or data directory, and all of them succeed."""
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from llama2_server.usage.ledger import Ledger\n"
        "from llama2_server.usage.store import Store\n"
        "async def main(directory, url):\n"
        "    store = Store(url) if url else None\n"
        "    await (await Ledger.open(data_directory=Path(directory), neuron_costs={}, store=store)).close()\n"
        "sys.stdin.readline()\n"
        "asyncio.run(main(*sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), url or ""]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        assert process.stdin
        process.stdin.close()
    assert [process.wait() for process in processes] == [0, 0, 0]


async def test_stores_migrate_at_the_same_time(tmp_path: Path, postgres: PostgresCluster) -> None:
    """Several ledgers and stores of one process can migrate at the same time."""
    stores = [Store(postgres.new_database()) for _ in range(3)]
    ledgers, _ = await asyncio.gather(
        asyncio.gather(*(Ledger.open(data_directory=tmp_path / f"{n}", neuron_costs={}) for n in range(3))),
        asyncio.gather(*(store.migrate() for store in stores)),
    )
    for store in stores:
        assert await store.totals(None, None, None) == []
        await store.close()
    for ledger in ledgers:
        await ledger.close()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("usage.db", "not a valid URL"),
        ("mysql://root:s3cret@host/db", "mysql is not supported"),
        ("postgresql://u:s3cret@host:port/db", "not a valid URL"),
        ("sqlite:///usage.db", "sqlite is not supported; use postgresql://.*, or no URL for a local file"),
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
    with pytest.raises(LedgerError, match=r"pip install '\.\[postgresql\]' in the clone"):
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
