"""Forwarding to PostgreSQL: records that it rejects, and data directories of servers that do not start again."""

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest
from tests.integration.usage.conftest import RECOVERY_TIMEOUT_SECONDS, LedgerOpener, crash, stored
from tests.integration.usage.expected_records import FINISHED, Expected, check_all, record_request
from tests.support.servers.postgres_server import PostgresCluster
from tests.support.service import until

from llama2_server.usage import operations
from llama2_server.usage.database import create_engine
from llama2_server.usage.errors import LedgerError
from llama2_server.usage.pricing import TokenUsage

POISON = "acme\0"


async def execute(url: str, statement: str) -> None:
    """Execute a statement in PostgreSQL."""
    engine = create_engine(url)
    async with engine.begin() as connection:
        await connection.exec_driver_sql(statement)
    await engine.dispose()


async def test_rejected_record_delays_no_other(
    tmp_path: Path, postgres: PostgresCluster, open_ledger: LedgerOpener, caplog: pytest.LogCaptureFixture
) -> None:
    """PostgreSQL cannot store an account with a NUL: its records are marked and count locally; others are stored."""
    url = postgres.new_database()
    ledger = await open_ledger(url=url)
    for number in range(20):
        await record_request(ledger, f"{number}", POISON if number in (3, 4) else "acme")
    await until(lambda: ledger.rejected == 2)
    assert await ledger.flush(RECOVERY_TIMEOUT_SECONDS)
    check_all(await stored(url), {f"{number}": FINISHED for number in range(20) if number not in (3, 4)})
    assert ledger.pending == 0
    [total] = await ledger.totals(POISON)
    assert total.requests == 2
    assert await ledger.totals(POISON, since=total.day, until=total.day) == [total]
    assert await ledger.totals(POISON, since=total.day + timedelta(days=1)) == []
    assert await ledger.totals(POISON, until=total.day - timedelta(days=1)) == []
    assert [total.requests for total in await ledger.totals("acme")] == [18]
    assert "the usage store rejected the record of request 3 (SQLSTATE 22021)" in caplog.text
    assert operations.retry_rejected(tmp_path) == 2
    await until(lambda: ledger.rejected == 0)
    await record_request(ledger, "later")
    await until(lambda: ledger.rejected == 2)
    await ledger.close()
    assert sorted(record.request_id for record in await stored(None, tmp_path)) == ["3", "4"]


async def test_record_is_not_rejected_without_evidence(
    tmp_path: Path, postgres: PostgresCluster, open_ledger: LedgerOpener
) -> None:
    """If the database rejects every record (class 23), none is marked; after the correction, all are stored."""
    url = postgres.new_database()
    ledger = await open_ledger(url=url)
    await execute(url, "ALTER TABLE usage_records ADD CONSTRAINT wrong CHECK (output_tokens < 0)")
    for number in range(5):
        await record_request(ledger, f"{number}")
    assert await ledger.flush(RECOVERY_TIMEOUT_SECONDS)  # each of them was tried
    assert [total.requests for total in await ledger.totals("acme")] == [5]
    assert (ledger.rejected, ledger.pending) == (0, 5)
    await execute(url, "ALTER TABLE usage_records DROP CONSTRAINT wrong")
    await until(lambda: ledger.pending == 0)
    assert ledger.rejected == 0
    check_all(await stored(url), {f"{number}": FINISHED for number in range(5)})


async def test_data_directory_is_emptied(tmp_path: Path, postgres: PostgresCluster, open_ledger: LedgerOpener) -> None:
    """Records and running requests of a killed server are forwarded, without a server."""
    url = postgres.new_database()
    ledger = await open_ledger()
    for number in range(30):
        await record_request(ledger, f"{number}")
    await ledger.admit("running", "acme", "model")
    ledger.progress("running", TokenUsage(7, 1))
    await ledger.commit()
    await crash(ledger)
    assert await operations.forward_records(tmp_path, url) == (31, 0)
    expected = {f"{number}": FINISHED for number in range(30)} | {"running": Expected("acme", TokenUsage(7, 1))}
    check_all(await stored(url), expected)
    assert await stored(None, tmp_path) == []
    assert await operations.forward_records(tmp_path, url) == (0, 0)


async def test_forwarding_without_a_store(
    tmp_path: Path, postgres: PostgresCluster, open_ledger: LedgerOpener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the store does not answer, the error has the number of records, and they stay in the directory."""
    monkeypatch.setattr(operations, "STALL_SECONDS", 0.2)
    url = postgres.new_database()
    ledger = await open_ledger()
    await record_request(ledger, "one")
    await ledger.close()
    await asyncio.to_thread(postgres.stop)
    try:
        with pytest.raises(LedgerError, match=r"^--usage-url: the store accepts no records \(1 are left\)"):
            await operations.forward_records(tmp_path, url)
    finally:
        await asyncio.to_thread(postgres.start)
    check_all(await stored(None, tmp_path), {"one": FINISHED})


async def test_totals_are_checked_and_repaired(url: str | None, tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """`usage check` reports each difference, and with `repair` corrects it."""
    ledger = await open_ledger(url=url)
    await record_request(ledger, "one")
    await ledger.close()

    async def check(*, repair: bool) -> list[str]:
        if url is None:
            return operations.check_local_totals(tmp_path, repair=repair)
        return await operations.check_store_totals(url, repair=repair)

    assert await check(repair=False) == []
    statement = "UPDATE usage_daily_totals SET requests = 7"
    if url is None:
        operations._in_database(tmp_path, lambda connection: connection.execute(statement), writes=True)
    else:
        await execute(url, statement)
    [difference] = await check(repair=False)
    assert "requests=7" in difference
    assert "requests=1" in difference
    assert await check(repair=True) == [difference]
    assert await check(repair=False) == []
