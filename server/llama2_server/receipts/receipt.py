"""Sign receipts: an Ed25519 signature of RFC 8785 JSON, which any language can check (docs/exactly-once.md)."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import rfc8785

from llama2_server.receipts.keys import ReceiptKeys

VERSION = 1
SIGNED_PREFIX = b"llama2-receipt-v1\0"
"""Precedes the payload in the signed bytes, so that no signature of the key is valid for another purpose."""


class Receipt(NamedTuple):
    """A signed statement."""

    key_id: str
    payload: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Statement:
    """What a receipt states."""

    request: Mapping[str, Any]
    """The request in protobuf's JSON form, without the fields that do not change the reply."""
    text: str
    """The whole text of the reply."""
    seed: int
    fingerprint: str | None
    input_tokens: int
    output_tokens: int
    neurons: str
    account_id: str
    request_id: str
    time: datetime
    """An aware time; the receipt has its seconds."""

    def payload(self) -> bytes:
        """Return the statement as RFC 8785 JSON. The seed is a text, because JSON numbers have 53 bits."""
        fields: dict[str, Any] = {
            "version": VERSION,
            "request_sha256": hashlib.sha256(rfc8785.dumps(dict(self.request))).hexdigest(),
            "response_sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            "seed": str(self.seed),
            "usage": {"input_tokens": self.input_tokens, "output_tokens": self.output_tokens},
            "neurons": self.neurons,
            "account": self.account_id,
            "request_id": self.request_id,
            "time": self.time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        if self.fingerprint is not None:
            fields["fingerprint"] = self.fingerprint
        return rfc8785.dumps(fields)


def sign(keys: ReceiptKeys, statement: Statement) -> Receipt:
    """Return the receipt of a statement; equal statements have equal receipts."""
    payload = statement.payload()
    return Receipt(keys.public.key_id, payload, keys.signing.sign(SIGNED_PREFIX + payload))
