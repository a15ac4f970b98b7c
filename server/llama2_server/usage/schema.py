"""The table of usage records, the same in SQLite and PostgreSQL."""

from datetime import UTC, datetime
from decimal import Decimal

from sqlalchemy import BigInteger, Boolean, Column, Date, DateTime, Dialect, Index, MetaData, Table, Text, TypeDecorator

NEURON_DECIMALS = 9


class NeuronAmount(TypeDecorator[Decimal]):
    """Neurons as an integer number of billionths: SQLite has no decimal type, and sums of integers are exact."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> int | None:
        """Convert neurons to billionths."""
        return None if value is None else int(value.scaleb(NEURON_DECIMALS))

    def process_result_value(self, value: int | Decimal | None, dialect: Dialect) -> Decimal | None:
        """Convert billionths, or their sum, to neurons."""
        return None if value is None else Decimal(value).scaleb(-NEURON_DECIMALS)


class UtcDateTime(TypeDecorator[datetime]):
    """Aware time in UTC; SQLite does not store time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert an aware time to UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return an aware time; a stored time without a zone is in UTC."""
        return None if value is None else value.replace(tzinfo=value.tzinfo or UTC).astimezone(UTC)


METADATA = MetaData()

usage_records = Table(
    "usage_records",
    METADATA,
    Column("request_id", Text, primary_key=True),
    Column("account", Text, key="account_id", nullable=False),
    Column("model", Text, nullable=False),
    Column("day", Date, nullable=False),  # of started_at, in UTC
    Column("started_at", UtcDateTime, nullable=False),
    Column("ended_at", UtcDateTime, key="finished_at", nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("served_from_cache", Boolean, key="cached", nullable=False),
    Column("nanoneurons", NeuronAmount, key="neurons", nullable=False),
    Column("outcome", Text, nullable=False),
    Index("ix_usage_records_account_day", "account_id", "day"),
)
