"""Exactly one record per admitted request, exact to the last digit, also while the store is unavailable."""

import asyncio
import logging
import random
import threading
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import count
from pathlib import Path

import pytest
from tests.integration.usage.conftest import COSTS, RECOVERY_TIMEOUT_SECONDS, LedgerOpener, crash, stored
from tests.integration.usage.expected_records import Expected, check_all, record_request
from tests.support.servers.postgres_server import PostgresCluster

from llama2_server.errors import UsageUnavailable
from llama2_server.usage import operations
from llama2_server.usage.database import create_engine
from llama2_server.usage.errors import LedgerError
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import TokenUsage, neurons
from llama2_server.usage.records import DailyUsage


async def record_until_full(ledger: Ledger) -> int:
    """Record requests 0, 1, 2, ... until one is rejected, and return the number of recorded requests."""
    for number in count():
        try:
            await record_request(ledger, f"{number}")
        except UsageUnavailable:
            return number
    raise AssertionError


async def test_two_servers_on_one_store(tmp_path: Path, url: str | None, open_ledger: LedgerOpener) -> None:
    """50 clients of 5 accounts use two servers, and cancel 10% of 500 requests: one record each, with exact neurons."""
    folders = [tmp_path / "one", tmp_path / ("one" if url is None else "two")]
    ledgers = [await open_ledger(url=url, data_directory=folder) for folder in folders]
    spent: dict[str, Decimal] = {f"account-{number}": Decimal(0) for number in range(5)}
    draw = random.Random(5)

    async def client(number: int) -> None:
        account_id, ledger = f"account-{number % 5}", ledgers[number % 2]
        for request in range(10):
            request_id = f"{number}.{request}"
            await ledger.admit(request_id, account_id, "model")
            tokens = TokenUsage(draw.randrange(1, 3000), draw.randrange(2500))
            ledger.progress(request_id, tokens)
            await asyncio.sleep(0)
            ledger.finish(request_id, "CANCELLED" if draw.random() < 0.1 else "MAX_TOKENS", tokens)
            spent[account_id] += neurons(tokens, COSTS)

    await asyncio.gather(*(client(number) for number in range(50)))
    await ledgers[1].close()
    for account_id, neurons_spent in spent.items():
        [total] = await ledgers[0].totals(account_id)
        assert (total.requests, total.neurons) == (100, neurons_spent)
    assert len(await stored(url, folders[0])) == 500


async def test_totals_include_the_latest_requests(tmp_path: Path, url: str | None, open_ledger: LedgerOpener) -> None:
    """Totals include requests that have just finished, under the UTC day on which they started."""
    times = [datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC) + timedelta(seconds=second) for second in range(8)]
    ledger = await open_ledger(url=url, now=lambda: times.pop(0))
    await record_request(ledger, "first")  # January to February
    await ledger.admit("second", "acme", "model")
    ledger.finish("second", "END_OF_SEQUENCE", TokenUsage(3, 5), cached=True)
    await record_request(ledger, "third", "other")
    days = [date(2026, 1, 31), date(2026, 2, 1)]
    price = neurons(TokenUsage(3, 5), COSTS)
    january = DailyUsage("acme", days[0], "model", 1, 0, 3, 5, 0, 0, price)
    february = DailyUsage("acme", days[1], "model", 1, 1, 0, 0, 3, 5, Decimal(0))
    assert await ledger.totals("acme") == [january, february]
    assert await ledger.totals("acme", since=days[1]) == [february]
    assert await ledger.totals("acme", until=days[0]) == [january]
    operator = operations.read_local_totals(tmp_path) if url is None else await operations.read_store_totals(url)
    assert operator == [january, february, *await ledger.totals("other")]
    await ledger.close()


async def test_store_that_does_not_answer(tmp_path: Path, postgres: PostgresCluster, open_ledger: LedgerOpener) -> None:
    """While the store does not answer, records wait up to the limit, which counts running requests; none is lost."""
    url = postgres.new_database()
    ledger = await open_ledger(url=url, max_pending_records=50)
    await record_request(ledger, "before")
    assert await ledger.flush(RECOVERY_TIMEOUT_SECONDS)
    await asyncio.to_thread(postgres.stop)
    try:
        await ledger.admit("long", "acme", "model")
        finished = await record_until_full(ledger)
        with pytest.raises(UsageUnavailable):
            ledger.check_capacity()
        assert finished == 49
        assert not await ledger.flush(0.1)
        assert ledger.pending == finished
        assert ledger.lag_seconds > 0
        ledger.finish("long", "MAX_TOKENS", TokenUsage(3, 5))
    finally:
        await asyncio.to_thread(postgres.start)
    assert await ledger.flush(RECOVERY_TIMEOUT_SECONDS)
    assert (ledger.pending, ledger.lag_seconds) == (0, 0)
    await record_request(ledger, "after")
    await ledger.close()
    names = ["before", "long", "after", *(f"{number}" for number in range(finished))]
    check_all(await stored(url), dict.fromkeys(names, Expected("acme", TokenUsage(3, 5), "MAX_TOKENS")))
    assert await stored(None, tmp_path) == []  # a forwarded record is deleted locally


async def test_failed_batch_is_retried(
    postgres: PostgresCluster, open_ledger: LedgerOpener, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the store is logged once, and the records are stored once the store works again."""
    caplog.set_level(logging.INFO)
    url = postgres.new_database()
    ledger = await open_ledger(url=url)
    engine = create_engine(url)
    async with engine.begin() as connection:
        await connection.exec_driver_sql("ALTER TABLE usage_records RENAME TO renamed")
    await record_request(ledger, "one")
    with pytest.raises(UsageUnavailable):
        await ledger.totals("acme")
    async with engine.begin() as connection:
        await connection.exec_driver_sql("ALTER TABLE renamed RENAME TO usage_records")
    await engine.dispose()
    assert await ledger.flush(RECOVERY_TIMEOUT_SECONDS)
    assert [record.request_id for record in await stored(url)] == ["one"]
    assert [record.message.split(",")[0] for record in caplog.records if "the usage store" in record.message] == [
        "the usage store is unavailable",
        "the usage store is available again",
    ]


async def test_postgresql_restart(
    tmp_path: Path, postgres: PostgresCluster, open_ledger: LedgerOpener, caplog: pytest.LogCaptureFixture
) -> None:
    """Servers run, start, stop and are killed without the database; each record is stored once.

    The log never contains the password.
    """
    url = postgres.new_database()
    ledger = await open_ledger(url=url)
    for number in range(700):
        await record_request(ledger, f"{number}")
    await asyncio.to_thread(postgres.stop)  # possibly in the middle of an insert
    for number in range(700, 1400):
        await record_request(ledger, f"{number}")
    with pytest.raises(UsageUnavailable):
        await ledger.totals("acme")
    killed = await open_ledger(url=url)
    await record_request(killed, "killed")
    await crash(killed)
    closed = await open_ledger(url=url, data_directory=tmp_path / "closed")
    await record_request(closed, "closed")
    await closed.close(0.1)
    successor = await open_ledger(url=url)
    assert successor.pending >= 1
    await asyncio.to_thread(postgres.start)
    assert await ledger.flush(RECOVERY_TIMEOUT_SECONDS)
    assert await successor.flush(RECOVERY_TIMEOUT_SECONDS)
    reopened = await open_ledger(url=url, data_directory=tmp_path / "closed")
    assert await reopened.flush(RECOVERY_TIMEOUT_SECONDS)
    names = ["killed", "closed", *(f"{number}" for number in range(1400))]
    check_all(await stored(url), dict.fromkeys(names, Expected("acme", TokenUsage(3, 5), "MAX_TOKENS")))
    assert "s3cret" not in caplog.text
    for one in (ledger, successor, reopened):
        await one.close()


async def test_progress_from_another_thread(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """The engine's thread can report progress while the event loop admits and finishes other requests."""
    ledger = await open_ledger()
    await ledger.admit("long", "acme", "model")

    def engine() -> None:
        for token in range(1, 20_001):
            ledger.progress("long", TokenUsage(9, token))

    thread = threading.Thread(target=engine)
    thread.start()
    number = 0
    while thread.is_alive():
        await record_request(ledger, f"{number}")
        number += 1
    # The thread may have reported thousands of tokens since the last commit, which a model cannot.
    await record_request(ledger, f"{number}")
    number += 1
    await crash(ledger)
    expected = {f"{one}": Expected("acme", TokenUsage(3, 5), "MAX_TOKENS") for one in range(number)}
    expected["long"] = Expected("acme", TokenUsage(9, 20_000))
    ledger = await open_ledger()
    assert await ledger.flush(RECOVERY_TIMEOUT_SECONDS)
    await ledger.close()
    check_all(await stored(None, tmp_path), expected)
    assert list((tmp_path / "usage-locks").iterdir()) == []


async def test_price_with_too_many_decimals_is_rejected(open_ledger: LedgerOpener) -> None:
    """A price that cannot be stored exactly prevents the start."""
    with pytest.raises(LedgerError, match=r"^neuron_cost of input_tokens: 1E-10 has more than 9 decimals; round it$"):
        await open_ledger(neuron_costs={"input_tokens": Decimal("1e-10")})


async def test_unusable_file_prevents_the_start(tmp_path: Path, open_ledger: LedgerOpener) -> None:
    """An unusable file or directory is one line of error, and leaves no lock."""
    with pytest.raises(LedgerError, match=r"^--usage-url: "):
        await open_ledger(url="usage.db")
    (tmp_path / "usage.db").write_bytes(b"not a database" * 100)
    with pytest.raises(LedgerError, match=r"^--data-directory: .*usage.db: file is not a database; check the file$"):
        await open_ledger()
    assert list((tmp_path / "usage-locks").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match=r"^--data-directory: .*file: (Not a directory|File exists)"):
        await open_ledger(data_directory=tmp_path / "file")


async def test_unknown_database_prevents_the_start(postgres: PostgresCluster, open_ledger: LedgerOpener) -> None:
    """A permanent error of the store is not retried at startup."""
    with pytest.raises(LedgerError, match=r'^--usage-url: .*database "nowhere" does not exist$'):
        await open_ledger(url=postgres.new_database().rpartition("/")[0] + "/nowhere")
