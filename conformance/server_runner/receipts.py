"""Check receipts by docs/exactly-once.md, without the code of the server and of the client."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf.json_format import MessageToDict

from conformance.server_runner.outcome import Outcome

PREFIX = b"llama2-receipt-v1\0"
OMITTED = ("idempotency_key", "resume_after_characters", "stream", "no_cache")
CLOCKS = timedelta(minutes=2)
"""The largest difference between the clocks of kit and server."""


def canonical(value: Any) -> bytes:
    """Return JSON by RFC 8785 of a value with ASCII names, and with numbers that Python prints in the same form."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def wrong_signature(outcome: Outcome, earlier: Sequence[Outcome]) -> Iterator[str]:
    """Yield what is wrong with the signature; an earlier call must have returned the card."""
    receipt = outcome.completion.receipt
    cards = [message for one in earlier for message in one.messages if hasattr(message, "receipt_keys")]
    listed = {key.key_id: bytes(key.public_key) for card in cards for key in card.receipt_keys}
    if receipt.key_id not in listed:
        yield f"key_id {receipt.key_id!r} is not one of {sorted(listed)}"
        return
    key = listed[receipt.key_id]
    if hashlib.sha256(key).hexdigest()[:16] != receipt.key_id:
        yield f"key_id {receipt.key_id!r} does not follow from the public key"
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(receipt.signature, PREFIX + receipt.payload)
    except (InvalidSignature, ValueError):
        yield "the signature is not that of the payload"


def wrong_digests(outcome: Outcome) -> Iterator[str]:
    """Yield the digests of a receipt that differ from the digests of request and text."""
    fields = {} if outcome.request is None else MessageToDict(outcome.request, preserving_proto_field_name=True)
    request = {name: value for name, value in fields.items() if name not in OMITTED}
    wanted = {"request_sha256": canonical(request), "response_sha256": outcome.text.encode()}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in wanted.items()}
    yield from _differences(digests, _payload(outcome))


def wrong_statement(outcome: Outcome) -> Iterator[str]:
    """Yield the members of a receipt that differ from the completion."""
    completion, payload = outcome.completion, _payload(outcome)
    usage = {"input_tokens": completion.usage.input_tokens, "output_tokens": completion.usage.output_tokens}
    plain = {"version": 1, "seed": str(completion.seed), "usage": usage, "neurons": completion.usage.neurons}
    wanted: dict[str, Any] = {**plain, "request_id": completion.request_id}
    if completion.HasField("fingerprint"):
        wanted["fingerprint"] = completion.fingerprint
    yield from _differences(wanted, payload)
    if not payload.get("account"):
        yield "account: want a name, got none"
    text = str(payload.get("time"))
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", text):
        yield f"time: got {text}"
    elif abs(datetime.now(UTC) - datetime.fromisoformat(text)) > CLOCKS:
        yield f"time: got {text}, which is not now"


def wrong_form(outcome: Outcome) -> Iterator[str]:
    """Yield whether the payload has another form than RFC 8785."""
    payload = bytes(outcome.completion.receipt.payload)
    if canonical(json.loads(payload)) != payload:
        yield f"got {payload.decode()}"


def _payload(outcome: Outcome) -> Mapping[str, Any]:
    payload: Mapping[str, Any] = json.loads(outcome.completion.receipt.payload or b"{}")
    return payload


def _differences(wanted: Mapping[str, Any], payload: Mapping[str, Any]) -> Iterator[str]:
    for name, value in wanted.items():
        if payload.get(name) != value:
            yield f"{name}: want {value!r}, got {payload.get(name)!r}"
