"""The local database and PostgreSQL behind one interface, for tests that hold for both."""

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from tests.integration.usage.conftest import stored

from llama2_server.usage.local import statements
from llama2_server.usage.local.database import Database
from llama2_server.usage.migrations import VERSION_TABLE
from llama2_server.usage.records import DailyUsage, UsageRecord
from llama2_server.usage.schema import LOCAL_METADATA, METADATA
from llama2_server.usage.store import Store

Differences = tuple[list[DailyUsage], list[DailyUsage]]


class UsageDatabase(Protocol):
    """A database of usage records."""

    async def migrate(self) -> None:
        """Create or migrate the tables."""

    async def upsert(self, records: Sequence[UsageRecord]) -> None:
        """Write records in one transaction."""

    async def delete(self, request_id: str) -> None:
        """Delete a record."""

    async def totals(self, account_id: str | None, since: date | None, until: date | None) -> list[DailyUsage]:
        """Return totals."""

    async def wrong_totals(self, *, repair: bool) -> Differences:
        """Compare the totals with the records."""

    async def execute(self, statement: str) -> None:
        """Execute a statement."""

    async def records(self) -> dict[str, UsageRecord]:
        """Return all records by request id."""

    async def schema_differences(self) -> list[object]:
        """Return the differences between the declared and the migrated schema."""

    async def close(self) -> None:
        """Close it."""


class LocalDatabase:
    """The local database of a data directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "usage.db"
        self._database: Database | None = None

    async def migrate(self) -> None:
        """Create or migrate the tables."""
        await self.close()
        self._database = Database.open(self._path)

    async def upsert(self, records: Sequence[UsageRecord]) -> None:
        """Write records in one transaction."""
        assert self._database
        with self._database.transaction() as connection:
            for record in records:
                statements.upsert(connection, record)

    async def delete(self, request_id: str) -> None:
        """Delete a record."""
        await self.execute(f"DELETE FROM usage_records WHERE request_id = '{request_id}'")  # noqa: S608 - of a test

    async def totals(self, account_id: str | None, since: date | None, until: date | None) -> list[DailyUsage]:
        """Return totals."""
        assert self._database
        return statements.totals(self._database.connection, account_id, since, until)

    async def wrong_totals(self, *, repair: bool) -> Differences:
        """Compare the totals with the records."""
        assert self._database
        with self._database.transaction() as connection:
            differences = statements.wrong_totals(connection)
            if repair:
                statements.rebuild_totals(connection)
        return differences

    async def execute(self, statement: str) -> None:
        """Execute a statement."""
        assert self._database
        self._database.connection.execute(statement)

    async def records(self) -> dict[str, UsageRecord]:
        """Return all records by request id."""
        return {record.request_id: record for record in await stored(None, self._path.parent)}

    async def schema_differences(self) -> list[object]:
        """Return the differences between the declared and the migrated schema."""
        engine = sa.create_engine(f"sqlite:///{self._path}", poolclass=sa.NullPool)
        with engine.connect() as connection:
            return differences(connection, [METADATA, LOCAL_METADATA])

    async def close(self) -> None:
        """Close it."""
        if self._database is not None:
            self._database.close()
            self._database = None


class PostgresDatabase(Store):
    """A database of PostgreSQL."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._url = url

    async def delete(self, request_id: str) -> None:
        """Delete a record."""
        await self.execute(f"DELETE FROM usage_records WHERE request_id = '{request_id}'")  # noqa: S608 - of a test

    async def execute(self, statement: str) -> None:
        """Execute a statement."""
        async with self._engine.begin() as connection:
            await connection.exec_driver_sql(statement)

    async def records(self) -> dict[str, UsageRecord]:
        """Return all records by request id."""
        return {record.request_id: record for record in await stored(self._url)}

    async def schema_differences(self) -> list[object]:
        """Return the differences between the declared and the migrated schema."""
        async with self._engine.connect() as connection:
            return await connection.run_sync(differences, [METADATA])


def differences(connection: sa.Connection, declared: list[sa.MetaData]) -> list[object]:
    """Return the differences between the declared and the migrated schema."""
    all_tables = sa.MetaData()
    for metadata in declared:
        for table in metadata.tables.values():
            table.to_metadata(all_tables)
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
    return list(compare_metadata(context, all_tables))
