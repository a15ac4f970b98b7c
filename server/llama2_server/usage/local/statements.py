"""The statements on the local database: running requests, records, and the state of forwarding.

All records of the file are waiting if the ledger forwards them: a record that the usage store has accepted is deleted.
"""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal

from llama2_server.usage.budgets.statements import DELETE as DELETE_RESERVATION
from llama2_server.usage.pricing import TokenUsage
from llama2_server.usage.records import INTERRUPTED, DailyUsage, RunningRequest, UsageRecord
from llama2_server.usage.schema import (
    NEURON_DECIMALS,
    REBUILD_TOTALS,
    SUMMED_TOTALS,
    UPSERT,
    daily_usage,
    row_of,
    select_totals,
)

_RUNNING = "request_id, account, model, started_at, updated_at, input_tokens, output_tokens, neuron_costs"
_RECORD = (
    "request_id, account, model, started_at, ended_at, input_tokens, output_tokens, served_from_cache, nanoneurons, "
    "outcome"
)
_NOT_REJECTED = "request_id NOT IN (SELECT request_id FROM rejected_records)"


def _text(time: datetime) -> str:
    return time.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def admit(connection: sqlite3.Connection, request: RunningRequest, instance: str) -> None:
    """Insert a running request of a server; a request with an idempotency key can run again, on another server."""
    costs = json.dumps({metric: str(cost) for metric, cost in request.neuron_costs.items()})
    started_at = _text(request.started_at)
    connection.execute(
        f"INSERT OR REPLACE INTO running_requests (instance, {_RUNNING}) VALUES (?, ?, ?, ?, ?, ?, 0, 0, ?)",  # noqa: S608 - constants
        (instance, request.request_id, request.account_id, request.model, started_at, started_at, costs),
    )


def progress(connection: sqlite3.Connection, request_id: str, tokens: TokenUsage, now: datetime) -> None:
    """Update the computed tokens of a running request."""
    connection.execute(
        "UPDATE running_requests SET input_tokens = ?, output_tokens = ?, updated_at = ? WHERE request_id = ?",
        (tokens.input_tokens, tokens.output_tokens, _text(now), request_id),
    )


def finish(connection: sqlite3.Connection, record: UsageRecord) -> None:
    """Replace a running request by its record."""
    withdraw(connection, record.request_id)
    upsert(connection, record)


def withdraw(connection: sqlite3.Connection, request_id: str) -> None:
    """Delete a running request without a record, and its reservation in a budget."""
    connection.execute("DELETE FROM running_requests WHERE request_id = ?", (request_id,))
    connection.execute(DELETE_RESERVATION, {"request_id": request_id})


def upsert(connection: sqlite3.Connection, record: UsageRecord) -> None:
    """Insert a record, or update it monotonically; triggers change the totals."""
    row = row_of(record)
    row |= {"day": row["day"].isoformat(), "started_at": _text(row["started_at"]), "ended_at": _text(row["ended_at"])}
    connection.execute(UPSERT, row)


def running_instances(connection: sqlite3.Connection) -> set[str]:
    """Return the servers that have running requests."""
    return {instance for (instance,) in connection.execute("SELECT DISTINCT instance FROM running_requests")}


def interrupt(connection: sqlite3.Connection, instance: str) -> int:
    """Replace the running requests of an ended server by their records, and return their number."""
    query = f"SELECT {_RUNNING} FROM running_requests WHERE instance = ?"  # noqa: S608 - constants
    rows = connection.execute(query, (instance,)).fetchall()
    for request_id, account, model, started_at, updated_at, inputs, outputs, costs in rows:
        prices = {metric: Decimal(cost) for metric, cost in json.loads(costs).items()}
        request = RunningRequest(request_id, account, model, _time(started_at), prices)
        tokens = TokenUsage(inputs, outputs)
        finish(connection, request.finish(INTERRUPTED, tokens, _time(updated_at), cached=False))
    return len(rows)


def release_claims(connection: sqlite3.Connection, instance: str) -> None:
    """Delete the idempotency keys that an ended server has claimed, and for which it has not admitted a request."""
    connection.execute("DELETE FROM idempotency_keys WHERE instance = ? AND state = 0", (instance,))


def totals(
    connection: sqlite3.Connection, account_id: str | None, since: date | None, until: date | None
) -> list[DailyUsage]:
    """Return usage by account, day in UTC and model, in this order; both days are included, None means no limit."""
    query, parameters = select_totals(account_id, since, until)
    for name in ("since", "until"):
        if name in parameters:
            parameters[name] = parameters[name].isoformat()
    return [daily_usage(row) for row in connection.execute(query, parameters)]


def wrong_totals(connection: sqlite3.Connection) -> tuple[list[DailyUsage], list[DailyUsage]]:
    """Return the stored totals that differ from the records, and the totals of the records in their place."""
    stored = {daily_usage(row) for row in connection.execute(select_totals(None, None, None)[0])}
    summed = {daily_usage(row) for row in connection.execute(SUMMED_TOTALS)}
    return sorted(stored - summed, key=_key), sorted(summed - stored, key=_key)


def rebuild_totals(connection: sqlite3.Connection) -> None:
    """Replace the stored totals by the totals of the records."""
    for statement in REBUILD_TOTALS:
        connection.execute(statement)


@dataclass(frozen=True, slots=True)
class Waiting:
    """The records that wait for the usage store."""

    count: int
    """Number of records, without rejected ones."""
    rejected: int
    last_position: int
    """Position of the newest record; a later record has a higher one."""
    oldest_finished_at: datetime | None


def waiting(connection: sqlite3.Connection) -> Waiting:
    """Return the state of the waiting records."""
    rejected, count, last = connection.execute(
        "SELECT (SELECT count(*) FROM rejected_records), (SELECT coalesce(sum(requests), 0) FROM usage_daily_totals),"
        " (SELECT coalesce(max(rowid), 0) FROM usage_records)"
    ).fetchone()
    oldest = connection.execute(
        f"SELECT ended_at FROM usage_records WHERE {_NOT_REJECTED} ORDER BY rowid LIMIT 1"  # noqa: S608 - constants
    ).fetchone()
    return Waiting(count - rejected, rejected, last, None if oldest is None else _time(oldest[0]))


def oldest_records(connection: sqlite3.Connection, count: int, without: Sequence[str] = ()) -> list[UsageRecord]:
    """Return the oldest records that are not rejected, without the requests of `without`."""
    return _records(
        connection,
        f"{_NOT_REJECTED} AND request_id NOT IN (SELECT value FROM json_each(?)) ORDER BY rowid LIMIT ?",  # noqa: S608 - constants
        (json.dumps(without), count),
    )


def records_of(connection: sqlite3.Connection, request_ids: Sequence[str]) -> list[UsageRecord]:
    """Return the records of these requests, and the rejected records."""
    condition = "request_id IN (SELECT value FROM json_each(?) UNION SELECT request_id FROM rejected_records)"
    return _records(connection, condition, (json.dumps(request_ids),))


def is_waiting(connection: sqlite3.Connection, last_position: int, without: Sequence[str]) -> bool:
    """Return whether a record up to this position waits, without rejected records and the requests of `without`."""
    query = (
        f"SELECT 1 FROM usage_records WHERE rowid <= ? AND {_NOT_REJECTED}"  # noqa: S608 - constants
        " AND request_id NOT IN (SELECT value FROM json_each(?)) LIMIT 1"
    )
    return connection.execute(query, (last_position, json.dumps(without))).fetchone() is not None


def delete_forwarded(connection: sqlite3.Connection, records: Sequence[UsageRecord]) -> None:
    """Delete records that the usage store has accepted, unless they have changed in the meantime."""
    connection.executemany(
        "DELETE FROM usage_records WHERE request_id = ? AND outcome = ? AND ended_at = ? AND input_tokens = ?"
        " AND output_tokens = ?",
        [(one.request_id, one.outcome, _text(one.finished_at), one.input_tokens, one.output_tokens) for one in records],
    )
    connection.executemany("DELETE FROM rejected_records WHERE request_id = ?", [(one.request_id,) for one in records])


def reject(connection: sqlite3.Connection, request_id: str, sqlstate: str) -> None:
    """Mark a record that the usage store does not accept."""
    connection.execute("INSERT OR REPLACE INTO rejected_records VALUES (?, ?)", (request_id, sqlstate))


def retry_rejected(connection: sqlite3.Connection) -> int:
    """Remove the marks of the rejected records, and return their number."""
    return connection.execute("DELETE FROM rejected_records").rowcount


def _records(connection: sqlite3.Connection, condition: str, parameters: tuple[object, ...]) -> list[UsageRecord]:
    rows = connection.execute(f"SELECT {_RECORD} FROM usage_records WHERE {condition}", parameters)  # noqa: S608 - constants
    return [
        UsageRecord(
            request_id,
            account,
            model,
            _time(started_at),
            _time(ended_at),
            inputs,
            outputs,
            bool(cached),
            Decimal(nanoneurons).scaleb(-NEURON_DECIMALS),
            outcome,
        )
        for request_id, account, model, started_at, ended_at, inputs, outputs, cached, nanoneurons, outcome in rows
    ]


def _key(usage: DailyUsage) -> tuple[str, date, str]:
    return usage.account_id, usage.day, usage.model
