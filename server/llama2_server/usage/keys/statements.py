"""The statements on the idempotency keys of the local database."""

import json
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime

from llama2_server.usage.keys.records import KeyRecord, KeyState

COLUMNS = (
    "digest",
    "request_id",
    "instance",
    "state",
    "seed",
    "fingerprint",
    "salt",
    "field_digests",
    "expires_at",
    "cached",
    "computations",
    "completion",
)
_LIST = ", ".join(COLUMNS)
_VALUES = ", ".join(f":{column}" for column in COLUMNS)
_CHANGES = ", ".join(f"{column} = excluded.{column}" for column in COLUMNS[1:])
_INSERT = f"INSERT INTO idempotency_keys ({_LIST}) VALUES ({_VALUES})"  # noqa: S608 - constants


def claim(connection: sqlite3.Connection, record: KeyRecord, now: datetime) -> KeyRecord:
    """Insert the record, and return it; if the key has a record already, return that one."""
    purge(connection, now, record.digest)
    connection.execute(f"{_INSERT} ON CONFLICT (digest) DO NOTHING", row_of(record))
    return find(connection, record.digest, now) or record


def find(connection: sqlite3.Connection, digest: str, now: datetime) -> KeyRecord | None:
    """Return the record of a key; None if it is unknown or expired."""
    query = f"SELECT {_LIST} FROM idempotency_keys WHERE digest = ? AND expires_at > ?"  # noqa: S608 - constants
    row = connection.execute(query, (digest, _text(now))).fetchone()
    return None if row is None else record_of(row)


def take_over(connection: sqlite3.Connection, found: KeyRecord, record: KeyRecord) -> bool:
    """Replace a claim whose server has ended; return False if the key has changed in the meantime."""
    connection.execute(
        "DELETE FROM idempotency_keys WHERE digest = ? AND state = ? AND request_id = ?",
        (found.digest, KeyState.CLAIMED, found.request_id),
    )
    changed = connection.execute(f"{_INSERT} ON CONFLICT (digest) DO NOTHING", row_of(record))
    return changed.rowcount == 1


def put(connection: sqlite3.Connection, record: KeyRecord) -> None:
    """Store the record, unless the stored one has a higher state."""
    condition = "excluded.state >= idempotency_keys.state"
    connection.execute(f"{_INSERT} ON CONFLICT (digest) DO UPDATE SET {_CHANGES} WHERE {condition}", row_of(record))


def release(connection: sqlite3.Connection, record: KeyRecord) -> None:
    """Delete the record of a call that was rejected."""
    connection.execute(
        "DELETE FROM idempotency_keys WHERE digest = ? AND request_id = ? AND state < ?",
        (record.digest, record.request_id, KeyState.COMPLETE),
    )


def purge(connection: sqlite3.Connection, now: datetime, digest: str | None = None) -> None:
    """Delete the expired records, or one of them."""
    condition = "" if digest is None else " AND digest = ?"
    parameters = (_text(now),) if digest is None else (_text(now), digest)
    connection.execute(f"DELETE FROM idempotency_keys WHERE expires_at <= ?{condition}", parameters)  # noqa: S608 - constants


def mark(connection: sqlite3.Connection, digest: str) -> None:
    """Mark a key as changed since the usage store got it."""
    connection.execute(
        "INSERT INTO unsent_keys VALUES (?, 1) ON CONFLICT (digest) DO UPDATE SET revision = revision + 1", (digest,)
    )


def unsent(connection: sqlite3.Connection, count: int, digest: str | None = None) -> list[tuple[int, KeyRecord]]:
    """Return the revisions and the records of the oldest marked keys, or of one of them."""
    condition = "" if digest is None else " WHERE digest = ?"
    query = f"SELECT revision, {_LIST} FROM unsent_keys JOIN idempotency_keys USING (digest){condition} LIMIT ?"  # noqa: S608 - constants
    rows = connection.execute(query, (count,) if digest is None else (digest, count)).fetchall()
    return [(revision, record_of(tuple(row))) for revision, *row in rows]


def unmark(connection: sqlite3.Connection, sent: Sequence[tuple[int, KeyRecord]]) -> None:
    """Remove the marks of keys that the usage store has, unless they have changed in the meantime."""
    connection.executemany(
        "DELETE FROM unsent_keys WHERE digest = ? AND revision = ?", [(key.digest, revision) for revision, key in sent]
    )


def purge_marks(connection: sqlite3.Connection) -> None:
    """Remove the marks of keys that have been deleted."""
    connection.execute("DELETE FROM unsent_keys WHERE digest NOT IN (SELECT digest FROM idempotency_keys)")


def row_of(record: KeyRecord) -> dict[str, object]:
    """Return the values of a record by column."""
    return {
        "digest": record.digest,
        "request_id": record.request_id,
        "instance": record.instance,
        "state": int(record.state),
        "seed": str(record.seed),  # beyond SQLite's signed integers
        "fingerprint": record.fingerprint,
        "salt": record.salt,
        "field_digests": json.dumps(dict(record.field_digests)),
        "expires_at": _text(record.expires_at),
        "cached": record.cached,
        "computations": record.computations,
        "completion": record.completion,
    }


def record_of(row: tuple[object, ...]) -> KeyRecord:
    """Return the record of a row with `COLUMNS`."""
    values = dict(zip(COLUMNS, row, strict=True))
    return KeyRecord(
        digest=str(values["digest"]),
        request_id=str(values["request_id"]),
        instance=str(values["instance"]),
        state=KeyState(int(str(values["state"]))),
        seed=int(str(values["seed"])),
        fingerprint=None if values["fingerprint"] is None else str(values["fingerprint"]),
        salt=str(values["salt"]),
        field_digests=json.loads(str(values["field_digests"])),
        expires_at=datetime.fromisoformat(str(values["expires_at"])).replace(tzinfo=UTC),
        cached=bool(values["cached"]),
        computations=int(str(values["computations"])),
        completion=bytes(values["completion"]),  # type: ignore[call-overload]
    )


def _text(time: datetime) -> str:
    return time.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
