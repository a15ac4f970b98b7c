"""Reading totals takes the same work for a few records as for many."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.support.service import ServiceMaker

from llama2.v1 import account_pb2, account_pb2_grpc
from llama2_server.usage.local import statements
from llama2_server.usage.local.database import Database
from llama2_server.usage.local.local_ledger import file_of
from llama2_server.usage.local.writer import Writer
from llama2_server.usage.records import UsageRecord

DAYS = 30
NOW = datetime.now(UTC).replace(hour=12)


def write_records(data_directory: Path, records_per_day: int) -> None:
    """Create a database with this many records of the anonymous account on each of the last days."""
    data_directory.mkdir()
    database = Database.open(file_of(data_directory))
    with database.transaction() as connection:
        for day in range(DAYS):
            at = NOW - timedelta(days=day)
            for number in range(records_per_day):
                record = UsageRecord(
                    f"{day}.{number}", "anonymous", "model", at, at, 10, 20, False, Decimal("11.016"), "MAX_TOKENS"
                )
                statements.upsert(connection, record)
    database.close()


@pytest.fixture
def count_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that returns the number of SQLite's steps in reads since its last call."""
    read = Writer.read
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    async def counted(writer: Writer, query: Callable[[Any], Any]) -> Any:
        def change(connection: Any) -> Any:
            connection.set_progress_handler(count, 1)
            try:
                return query(connection)
            finally:
                connection.set_progress_handler(None, 0)

        return await read(writer, change)

    monkeypatch.setattr(Writer, "read", counted)

    def taken() -> int:
        nonlocal steps
        counted, steps = steps, 0
        return counted

    return taken


async def test_totals_cost_the_same_for_many_records(
    tmp_path: Path, serve_scripted: ServiceMaker, count_steps: Callable[[], int]
) -> None:
    """GetUsage takes exactly as many steps of SQLite for 9,000 records as for 30: it reads the daily totals."""
    taken = []
    for records_per_day in (1, 300):
        data = tmp_path / f"{records_per_day}"
        write_records(data, records_per_day)
        async with serve_scripted(data_directory=data) as service:
            stub: Any = account_pb2_grpc.AccountServiceStub(service.channel)
            usage = await stub.GetUsage(account_pb2.GetUsageRequest())
        assert [day.requests for day in usage.days] == [records_per_day] * DAYS
        taken.append(count_steps())
    few, many = taken
    assert few == many > DAYS
