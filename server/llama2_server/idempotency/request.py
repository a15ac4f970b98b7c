"""A request with an idempotency key, and the digests that are stored of it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llama2_server.errors import IdempotencyKeyReused, InvalidRequest, Violation
from llama2_server.generation.reply import ReplyStats
from llama2_server.generation.reply_source import ReplyRequest
from llama2_server.generation.response_cache import CacheKey
from llama2_server.usage.keys.records import KeyRecord


@dataclass(frozen=True, slots=True)
class KeyedRequest:
    """A valid request with an idempotency key."""

    reply: ReplyRequest
    key_digest: str
    """`key_digest` of the key."""
    fields: Mapping[str, bytes]
    """The fields that must be equal in all calls of the key, each in a canonical form, by name."""
    cache_key: CacheKey | None
    """Identifies equal requests, also if this one does not use the response cache; None without a cache."""
    resume_after: int
    """Number of characters that the client has already."""
    describe: Callable[[str, ReplyStats, bool], bytes]
    """Returns the completion, without timings, for a request id, the statistics of the reply, and whether the key holds
    only on this server."""


def key_digest(model: str, account_id: str, key: str) -> str:
    """Return the digest that identifies an account's key in the usage store, which several models can share."""
    return hashlib.sha256(json.dumps([model, account_id, key]).encode()).hexdigest()


def field_digests(salt: str, fields: Mapping[str, bytes]) -> dict[str, str]:
    """Return the salted digest of each field."""
    return {name: hashlib.sha256(f"{salt} {name} ".encode() + value).hexdigest() for name, value in fields.items()}


def beyond_the_text(characters: int) -> InvalidRequest:
    """Return the error of a call that resumes after the end of a text with this number of characters."""
    message = f"must be at most {characters}, the number of characters of the reply"
    return InvalidRequest([Violation("resume_after_characters", message)])


def check_fields(record: KeyRecord, fields: Mapping[str, bytes]) -> None:
    """Check that a request is the one that used the key first.

    Raises:
        IdempotencyKeyReused: a field differs.
    """
    digests = field_digests(record.salt, fields)
    for name in [*digests, *(name for name in record.field_digests if name not in digests)]:
        if digests.get(name) != record.field_digests.get(name):
            raise IdempotencyKeyReused(name)
