"""The rules for errors and receipts that need more than the reply."""

import hashlib
from datetime import UTC, datetime, timedelta

import pytest
from conformance.server_runner.invariants import broken
from conformance.server_runner.outcome import Outcome
from conformance.server_runner.receipts import PREFIX, canonical
from conformance.v1 import conformance_pb2 as pb
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.rpc import error_details_pb2

from llama2.v1 import model_pb2, text_generation_pb2

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = KEY.public_key().public_bytes_raw()
KEY_ID = hashlib.sha256(PUBLIC).hexdigest()[:16]


@pytest.mark.parametrize(("minutes", "right"), [(0, True), (1, True), (-3, False), (60, False)])
def test_the_delay_ends_with_the_month(minutes: int, right: bool) -> None:
    """The delay ends at the first midnight of the next month in UTC, to within two minutes."""
    now = datetime.now(UTC)
    first = (now.replace(day=28) + timedelta(days=4)).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    outcome = Outcome()
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromTimedelta(first + timedelta(minutes=minutes) - now)
    outcome.status.details.add().Pack(retry)
    assert (not [*broken(pb.INVARIANT_NEXT_MONTH, outcome, [])]) == right


def _reply(payload: bytes, signed: bytes) -> Outcome:
    reply = text_generation_pb2.GenerateResponse(response="hello")
    reply.completion.receipt.key_id = KEY_ID
    reply.completion.receipt.payload = payload
    reply.completion.receipt.signature = KEY.sign(signed)
    return Outcome(messages=[reply])


def test_the_signature_covers_the_prefix() -> None:
    """A key of the card must have signed the payload after the prefix; without the card, no key is known."""
    payload = canonical({"version": 1})
    card = Outcome(messages=[model_pb2.GetModelCardResponse(receipt_keys=[{"key_id": KEY_ID, "public_key": PUBLIC}])])
    rule = pb.INVARIANT_RECEIPT_SIGNATURE
    assert [*broken(rule, _reply(payload, PREFIX + payload), [card])] == []
    assert [*broken(rule, _reply(payload, payload), [card])] == ["the signature is not that of the payload"]
    assert [*broken(rule, _reply(payload, PREFIX + payload), [])] == [f"key_id '{KEY_ID}' is not one of []"]


def test_digests_omit_what_does_not_change_the_text() -> None:
    """The digest of a request is that of its JSON by RFC 8785 without the omitted fields, with sorted names."""
    request = text_generation_pb2.GenerateRequest(prompt="é", max_tokens=5, no_cache=True, idempotency_key="k")
    digests = {
        "request_sha256": hashlib.sha256('{"max_tokens":5,"prompt":"é"}'.encode()).hexdigest(),
        "response_sha256": hashlib.sha256(b"hello").hexdigest(),
    }
    outcome = _reply(canonical(digests), b"")
    outcome.request = request
    assert [*broken(pb.INVARIANT_RECEIPT_DIGESTS, outcome, [])] == []
    request.max_tokens = 6
    assert len([*broken(pb.INVARIANT_RECEIPT_DIGESTS, outcome, [])]) == 1
