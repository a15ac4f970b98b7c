"""The tables of the usage database and the statements on them, the same in SQLite and PostgreSQL."""

from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Dialect,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
)

from llama2_server.usage.errors import LedgerError
from llama2_server.usage.records import COMPLETE, INTERRUPTED, DailyUsage, UsageRecord

NEURON_DECIMALS = 9


def check_prices(neuron_costs: Mapping[str, Decimal]) -> None:
    """Check that the database can store the prices exactly.

    Raises:
        LedgerError: a price has too many decimals.
    """
    for metric, cost in neuron_costs.items():
        if cost.scaleb(NEURON_DECIMALS) % 1:
            raise LedgerError(f"neuron_cost of {metric}: {cost} has more than {NEURON_DECIMALS} decimals; round it")


class NeuronAmount(TypeDecorator[Decimal]):
    """Neurons as an integer number of billionths: SQLite has no decimal type, and sums of integers are exact."""

    impl = BigInteger
    cache_ok = True

    def process_result_value(self, value: int | Decimal | None, dialect: Dialect) -> Decimal | None:
        """Convert billionths, or their sum, to neurons."""
        return None if value is None else Decimal(value).scaleb(-NEURON_DECIMALS)


class UtcDateTime(TypeDecorator[datetime]):
    """Aware time in UTC; SQLite does not store time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

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

TOTALS = (
    "requests",
    "cached_requests",
    "input_tokens",
    "output_tokens",
    "cached_input_tokens",
    "cached_output_tokens",
    "nanoneurons",
)
# Triggers on `usage_records` keep this table in the same transaction.
usage_daily_totals = Table(
    "usage_daily_totals",
    METADATA,
    Column("account", Text, primary_key=True),
    Column("day", Date, primary_key=True),
    Column("model", Text, primary_key=True),
    *(Column(total, BigInteger, nullable=False) for total in TOTALS),
)

idempotency_keys = Table(
    "idempotency_keys",
    METADATA,
    Column("digest", Text, primary_key=True),
    Column("request_id", Text, nullable=False),
    Column("instance", Text, nullable=False),  # the lock of the server that claimed the key
    Column("state", Integer, nullable=False),
    Column("seed", Text, nullable=False),
    Column("fingerprint", Text, nullable=True),
    Column("salt", Text, nullable=False),
    Column("field_digests", Text, nullable=False),  # JSON
    Column("expires_at", UtcDateTime, nullable=False),
    Column("cached", Boolean, nullable=False),
    Column("computations", Integer, nullable=False),
    Column("completion", LargeBinary, nullable=False),
    # In a usage store: which server works on the key, until when in milliseconds since 1970 by the store's clock, and
    # whether another server waits for it.
    Column("holder", Text, nullable=False),
    Column("held_until", BigInteger, nullable=False),
    Column("wanted", Boolean, nullable=False),
    Index("ix_idempotency_keys_expires_at", "expires_at"),
    Index("ix_idempotency_keys_holder", "holder"),
)
# A reservation counts until its request has a record.
budget_reservations = Table(
    "budget_reservations",
    METADATA,
    Column("request_id", Text, primary_key=True),
    Column("account", Text, nullable=False),
    Column("day", Date, nullable=False),  # of the request's start, in UTC
    Column("nanoneurons", BigInteger, nullable=False),
    Index("ix_budget_reservations_account_day", "account", "day"),
)

LOCAL_METADATA = MetaData()
"""Tables that only a local database has."""

running_requests = Table(
    "running_requests",
    LOCAL_METADATA,
    Column("request_id", Text, primary_key=True),
    Column("instance", Text, nullable=False),  # the lock of the server
    Column("account", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("neuron_costs", Text, nullable=False),  # JSON
)
# Keys that have changed since the usage store got them.
unsent_keys = Table(
    "unsent_keys",
    LOCAL_METADATA,
    Column("digest", Text, primary_key=True),
    Column("revision", BigInteger, nullable=False),
)
rejected_records = Table(
    "rejected_records",
    LOCAL_METADATA,
    Column("request_id", Text, primary_key=True),
    Column("sqlstate", Text, nullable=False),
)

# An upsert is monotonic: of two outcomes of one request, the complete one, and then the later one, is kept, and numbers
# never fall. Each column is a maximum, so any order of any upserts, also repeated ones, has the same result. A request
# with an idempotency key can have several attempts; only one of them needs a complete reply.
_RANK = f"CASE WHEN {{row}}.outcome IN {COMPLETE} THEN 2 WHEN {{row}}.outcome <> '{INTERRUPTED}' THEN 1 ELSE 0 END"
_OUTCOME = (_RANK, "{row}.ended_at", "{row}.outcome", "{row}.served_from_cache")
_NUMBERS = ("input_tokens", "output_tokens", "nanoneurons")
_IS_NEWER = "({}) > ({})".format(
    ", ".join(value.format(row="excluded") for value in _OUTCOME),
    ", ".join(value.format(row="old") for value in _OUTCOME),
)


def _upsert() -> str:
    columns = [column.name for column in usage_records.c]
    is_greater = {number: f"excluded.{number} > old.{number}" for number in _NUMBERS}
    conditions = dict.fromkeys(("ended_at", "outcome", "served_from_cache"), _IS_NEWER) | is_greater
    changes = (
        f"{name} = CASE WHEN {is_new} THEN excluded.{name} ELSE old.{name} END" for name, is_new in conditions.items()
    )
    return (
        f"INSERT INTO usage_records AS old ({', '.join(columns)}) VALUES ({', '.join(f':{name}' for name in columns)}) "  # noqa: S608 - constants
        f"ON CONFLICT (request_id) DO UPDATE SET {', '.join(changes)} "
        f"WHERE {' OR '.join([_IS_NEWER, *is_greater.values()])}"
    )


UPSERT = _upsert()
"""Insert a record, with the parameters of `row_of`, or update the request's record monotonically."""


def row_of(record: UsageRecord) -> dict[str, Any]:
    """Return the values of a record by column."""
    return {
        "request_id": record.request_id,
        "account": record.account_id,
        "model": record.model,
        "day": record.started_at.astimezone(UTC).date(),
        "started_at": record.started_at.astimezone(UTC),
        "ended_at": record.finished_at.astimezone(UTC),
        "input_tokens": record.input_tokens,
        "output_tokens": record.output_tokens,
        "served_from_cache": record.cached,
        "nanoneurons": int(record.neurons.scaleb(NEURON_DECIMALS)),
        "outcome": record.outcome,
    }


SUMS = ", ".join(
    f"CAST(sum({value}) AS BIGINT) AS {total}"
    for total, value in {
        "requests": "1",
        "cached_requests": "CASE WHEN served_from_cache THEN 1 ELSE 0 END",
        "input_tokens": "CASE WHEN served_from_cache THEN 0 ELSE input_tokens END",
        "output_tokens": "CASE WHEN served_from_cache THEN 0 ELSE output_tokens END",
        "cached_input_tokens": "CASE WHEN served_from_cache THEN input_tokens ELSE 0 END",
        "cached_output_tokens": "CASE WHEN served_from_cache THEN output_tokens ELSE 0 END",
        "nanoneurons": "nanoneurons",
    }.items()
)
SUMMED_TOTALS = f"SELECT account, day, model, {SUMS} FROM usage_records GROUP BY account, day, model"  # noqa: S608 - constants
"""The totals, computed from all records."""
REBUILD_TOTALS = (
    "DELETE FROM usage_daily_totals",
    f"INSERT INTO usage_daily_totals (account, day, model, {', '.join(TOTALS)}) {SUMMED_TOTALS}",
)
"""The statements that replace the stored totals by the totals of the records."""


def select_totals(account_id: str | None, since: date | None, until: date | None) -> tuple[str, dict[str, Any]]:
    """Return the query of the totals by account, day and model, in this order, and its parameters.

    Both days are included; None means no limit.
    """
    values = {"account": account_id, "since": since, "until": until}
    conditions = {"account": "account = :account", "since": "day >= :since", "until": "day <= :until"}
    parameters = {name: value for name, value in values.items() if value is not None}
    where = " AND ".join(conditions[name] for name in parameters)
    query = f"SELECT account, day, model, {', '.join(TOTALS)} FROM usage_daily_totals"  # noqa: S608 - constants
    return f"{query}{' WHERE ' if where else ''}{where} ORDER BY account, day, model", parameters


def daily_usage(row: tuple[Any, ...]) -> DailyUsage:
    """Return the totals of a row of `select_totals`."""
    account, day, model, *counts, nanoneurons = row
    if isinstance(day, str):  # SQLite has no dates
        day = date.fromisoformat(day)
    requests, cached, *tokens = map(int, counts)
    neurons = Decimal(int(nanoneurons)).scaleb(-NEURON_DECIMALS)
    inputs, outputs, cached_inputs, cached_outputs = tokens
    return DailyUsage(account, day, model, requests, cached, inputs, outputs, cached_inputs, cached_outputs, neurons)
