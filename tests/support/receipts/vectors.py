"""The test vectors of receipts, for every language.

    python -m tests.support.receipts.vectors      # write them again, only if the format is meant to change

The keys follow from fixed numbers, and Ed25519 signatures are deterministic: a server always makes these bytes.
"""

import base64
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.support.repository import ROOT

from llama2.v1 import text_generation_pb2 as pb
from llama2_client.receipts.document import signed_request
from llama2_server.receipts.keys import PublicKey, ReceiptKeys
from llama2_server.receipts.receipt import Receipt, Statement, sign

VECTORS = ROOT / "examples/receipts/vectors.json"
STATEMENT = Statement(
    request={},
    text="Once upon a time there was a llama.",
    seed=7,
    fingerprint="f0" * 32,
    input_tokens=12,
    output_tokens=9,
    neurons="7.7112",
    account_id="42",
    request_id="6d1a4a7d1f3e4c0e9a3b5c7d9e1f2a3b",
    time=datetime(2026, 11, 26, 12, 0, 0, 999_999, tzinfo=UTC),
)
REQUESTS = {
    "a prompt": pb.GenerateRequest(prompt="a story"),
    "every field": pb.GenerateRequest(
        prompt="Où est la gare? 今天天气很好。 🦙",
        raw=True,
        max_tokens=100,
        temperature=0.1,
        top_p=1.0,
        top_k=40,
        seed=2**64 - 1,
        repetition_penalty=1.3,
        frequency_penalty=-1e-7,
        presence_penalty=-2,
        stop=["\n\n", '"', "\\", "\u2028", "🦊"],
    ),
    "a conversation": pb.GenerateRequest(
        messages=[pb.ChatMessage(role="system", content=""), pb.ChatMessage(role="user", content="\x00\x1f\x7fé")],
        temperature=0,
    ),
    "fields that no receipt covers": pb.GenerateRequest(prompt="a story", stream=True, no_cache=True),
}
STATEMENTS = {
    "an empty text of a free reply": replace(STATEMENT, text="", neurons="0"),
    "no fingerprint": replace(STATEMENT, fingerprint=None),
    "other alphabets": replace(STATEMENT, text="e\u0301 é 🦙\u2029\ufeff", account_id='"konto" \\ ö', seed=2**64 - 1),
}


def test_keys(number: int) -> ReceiptKeys:
    """Return the keys of a number."""
    key = Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)
    public = PublicKey.of(key.public_key())
    return ReceiptKeys(key, public, (public,))


KEYS, OTHER_KEYS = test_keys(1), test_keys(2)


def document(statement: Statement, receipt: Receipt) -> dict[str, Any]:
    """Return the document of a receipt."""
    encoded = {name: base64.b64encode(getattr(receipt, name)).decode() for name in ("payload", "signature")}
    return {
        "request": dict(statement.request),
        "response": statement.text,
        "receipt": {"key_id": receipt.key_id, **encoded},
    }


def signed(statement: Statement, keys: ReceiptKeys = KEYS) -> dict[str, Any]:
    """Return the document of a statement's receipt."""
    return document(statement, sign(keys, statement))


def vectors() -> dict[str, Any]:
    """Return the content of the file."""
    valid = {name: signed(replace(STATEMENT, request=signed_request(request))) for name, request in REQUESTS.items()}
    valid |= {name: signed(statement) for name, statement in STATEMENTS.items()}
    entries = [{"name": name, "valid": True, "document": found} for name, found in valid.items()]
    entries += [{"name": name, "valid": False, "document": found} for name, found in _invalid(valid["every field"])]
    return {"public_keys": [base64.b64encode(KEYS.public.raw).decode()], "vectors": entries}


def _invalid(valid: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "the key of another service", signed(STATEMENT, OTHER_KEYS)
    stolen = signed(STATEMENT, OTHER_KEYS)
    stolen["receipt"]["key_id"] = KEYS.public.key_id
    yield "another key under the id of this one", stolen
    for part in ("request", "response"):
        changed = copy.deepcopy(valid)
        changed[part] = {**changed[part], "max_tokens": 99} if part == "request" else changed[part] + " "
        yield f"another {part}", changed
    changed = copy.deepcopy(valid)
    changed["request"]["no_cache"] = True
    yield "a field that no receipt covers", changed
    payload = base64.b64decode(valid["receipt"]["payload"])
    for name, signed_bytes in (("no prefix", payload), ("another prefix", b"llama2-receipt-v2\0" + payload)):
        signature = KEYS.signing.sign(signed_bytes)
        yield f"a signature with {name}", document_with(valid, signature=signature)
    yield "another price", document_with(valid, payload=payload.replace(b'"7.7112"', b'"7.7111"'))
    yield "a space in the payload", document_with(valid, payload=payload.replace(b":", b": ", 1))


def document_with(valid: dict[str, Any], **changes: bytes) -> dict[str, Any]:
    """Return a document with other bytes in its receipt."""
    changed = copy.deepcopy(valid)
    changed["receipt"] |= {name: base64.b64encode(value).decode() for name, value in changes.items()}
    return changed


def text() -> str:
    """Return the text of the file; ASCII, so that no editor changes a character."""
    return json.dumps(vectors(), indent=1) + "\n"


if __name__ == "__main__":
    VECTORS.write_text(text(), encoding="ascii")
