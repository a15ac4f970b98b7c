"""What the usage database has of an idempotency key: digests, numbers and ids, never text."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime


class KeyState(enum.IntEnum):
    """How far the calls of a key have come; a state never falls."""

    CLAIMED = 0
    """A call checks queue and quota; if it is rejected, the key is released."""
    OPEN = 1
    """The call has a usage record; no call has received the whole reply."""
    COMPLETE = 2
    """A call has received the whole reply."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One key. Calls with the key continue the usage record of `request_id`."""

    digest: str
    """SHA-256 of model, account and key, in hexadecimal."""
    request_id: str
    instance: str
    """The server that claimed the key."""
    state: KeyState
    seed: int
    fingerprint: str | None
    """Names everything that decided the text; None if the text cannot be computed again."""
    salt: str
    field_digests: Mapping[str, str]
    """Salted SHA-256 of each field of the request by name, in hexadecimal."""
    expires_at: datetime
    cached: bool = False
    """Whether the reply was computed for another call, and is free."""
    computations: int = 0
    """How often the reply was computed, without attempts that the server broke off."""
    completion: bytes = b""
    """The completion that each call gets, without its timings; empty before the state COMPLETE."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The result of a claim."""

    record: KeyRecord
    is_new: bool
    """Whether the caller claimed the key; it must then admit the request or release the key."""
    is_shared: bool = False
    """Whether this server holds the key in the usage store."""
    is_local: bool = False
    """Whether the key holds only on this server, because the usage store did not answer."""


@dataclass(frozen=True, slots=True)
class HeldKey:
    """A key in the usage store."""

    record: KeyRecord
    holder: str
    """The server that works on the key."""
