"""The statements on the idempotency keys of a usage store, the same in PostgreSQL and in the SQLite of a simulation.

A server holds a key while it works on it: `holder` names it, and it renews `held_until` each second. Then one upsert is
both the claim of a new key and the answer about a used one. Its changes are monotonic: a state never falls, and the
first completion stays.
"""

from dataclasses import dataclass
from typing import Any

from llama2_server.usage.keys.records import KeyRecord, KeyState
from llama2_server.usage.keys.statements import COLUMNS, row_of

POSTGRESQL_NOW = "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)"
"""The store's clock, in milliseconds since 1970."""
_LIST = ", ".join(COLUMNS)
_OWN = "old.holder = :server"
_SAME = "old.request_id = excluded.request_id"
# A claim of this server that it could not delete after it had rejected the call.
_REJECTED = f"(old.state = {KeyState.CLAIMED:d} AND {_OWN} AND NOT {_SAME})"
# Only the holder changes a key that is not complete. Another server may still end with a complete reply.
_CONTINUES = (
    f"({_SAME} AND old.state < {KeyState.COMPLETE:d} AND excluded.state >= old.state "
    f"AND ({_OWN} OR excluded.state = {KeyState.COMPLETE:d}))"
)


@dataclass(frozen=True, slots=True)
class Statements:
    """The statements, whose parameters `parameters_of` and the key store return."""

    claim: str
    """Insert a key and hold it. Otherwise hold it if no other server does, and return it with its holder."""
    find: str
    """Hold a key if no other server does, and return it with its holder; no row for an unknown key."""
    put: str
    """Store a key, unless the stored one has come further."""
    release: str = "UPDATE idempotency_keys SET holder = '', held_until = 0 WHERE digest = :digest AND holder = :server"
    """End holding a key."""
    release_all: str = "UPDATE idempotency_keys SET holder = '', held_until = 0 WHERE holder = :server"
    """End holding all keys of a server that has ended."""
    withdraw: str = (
        "DELETE FROM idempotency_keys WHERE digest = :digest AND request_id = :request_id "  # noqa: S608 - constants
        f"AND state < {KeyState.COMPLETE:d} AND holder = :server"
    )
    """Delete the key of a call that was rejected, unless another server continues the call."""
    renew: str = ""
    """Continue to hold the server's keys; return their digests, and whether another server waits for each."""
    purge: str = ""
    """Delete the expired keys."""

    @classmethod
    def at(cls, now: str) -> "Statements":
        """Return the statements for a store whose clock is this expression, in milliseconds since 1970."""
        is_free = f"({_OWN} OR old.held_until <= {now})"
        expired = f"(old.expires_at <= :now AND (old.held_until <= {now}))"
        hold = {"holder": ":server", "held_until": f"{now} + :hold_ms"}
        claimed = {name: f"CASE WHEN {is_free} THEN {value} ELSE old.{name} END" for name, value in hold.items()}
        claimed["wanted"] = f"NOT {is_free}"
        set_claimed = ", ".join(f"{name} = {value}" for name, value in claimed.items())
        kept = {name: f"CASE WHEN {_OWN} THEN excluded.{name} ELSE old.{name} END" for name in hold}
        return cls(
            claim=f"{_upsert(now, expired, claimed)} RETURNING {_LIST}, holder",
            find=(
                f"UPDATE idempotency_keys AS old SET {set_claimed} WHERE digest = :digest AND NOT {expired} "  # noqa: S608 - constants
                f"RETURNING {_LIST}, holder"
            ),
            put=_upsert(now, expired, kept),
            renew=(
                f"UPDATE idempotency_keys SET held_until = {now} + :hold_ms WHERE holder = :server "  # noqa: S608 - constants
                "RETURNING digest, wanted"
            ),
            purge=f"DELETE FROM idempotency_keys AS old WHERE {expired}",  # noqa: S608 - constants
        )


def parameters_of(record: KeyRecord) -> dict[str, Any]:
    """Return the values of a record by column; the time is aware and in UTC."""
    return row_of(record) | {"expires_at": record.expires_at}


def _upsert(now: str, expired: str, holding: dict[str, str]) -> str:
    replaced = f"({expired} OR {_REJECTED})"
    conditions = dict.fromkeys(COLUMNS[1:], f"{replaced} OR {_CONTINUES}") | {
        "state": f"{replaced} OR ({_SAME} AND excluded.state > old.state)",
        "computations": f"{replaced} OR ({_SAME} AND excluded.computations > old.computations)",
        "completion": f"{replaced} OR ({_SAME} AND length(old.completion) = 0)",
    }
    changes = {
        name: f"CASE WHEN {condition} THEN excluded.{name} ELSE old.{name} END"
        for name, condition in conditions.items()
    } | holding
    values = ", ".join(f":{name}" for name in COLUMNS)
    return (
        f"INSERT INTO idempotency_keys AS old ({_LIST}, holder, held_until, wanted) "  # noqa: S608 - constants
        f"VALUES ({values}, :holder, {now} + :hold_ms, FALSE) "
        f"ON CONFLICT (digest) DO UPDATE SET {', '.join(f'{name} = {value}' for name, value in changes.items())}"
    )
