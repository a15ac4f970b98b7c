"""Verify receipts offline: Ed25519 over RFC 8785 JSON."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from llama2_client.receipts.document import ReceiptDocument, ReceiptError

VERSION = 1
SIGNED_PREFIX = b"llama2-receipt-v1\0"
KEY_ID_DIGITS = 16
RAW_KEY_BYTES = 32
PEM_START = b"-----BEGIN PUBLIC KEY-----"
MISSING_EXTRA = "needs the packages of the extra `verify`; run pip install '.[verify]' in a clone"


@dataclass(frozen=True, slots=True)
class Statement:
    """What a valid receipt states about a request and its reply."""

    key_id: str
    seed: int
    fingerprint: str | None
    input_tokens: int
    output_tokens: int
    neurons: Decimal
    account: str
    request_id: str
    time: datetime


def read_public_key(file: Path | str) -> bytes:
    """Return the 32 bytes of a public key: a PEM file, or a file with their base64, as GetModelCard's JSON has it.

    Raises:
        OSError: the file cannot be read.
        ReceiptError: it has no Ed25519 key, or the extra `verify` is not installed.
    """
    data = Path(file).read_bytes().strip()
    try:
        raw = _pem_key(data) if data.startswith(PEM_START) else base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != RAW_KEY_BYTES:
        raise ReceiptError(f"{file}: not an Ed25519 public key in PEM or base64; pass the .pub file of the operator")
    return raw


def verify_receipt(document: ReceiptDocument | bytes | str, public_keys: Iterable[bytes]) -> Statement:
    """Check that one of the keys signed this text as the reply to this request, and return the statement.

    Raises:
        ReceiptError: the receipt is not valid, or the extra `verify` is not installed.
    """
    if not isinstance(document, ReceiptDocument):
        document = ReceiptDocument.parse(document)
    keys = {hashlib.sha256(key).hexdigest()[:KEY_ID_DIGITS]: key for key in public_keys}
    if document.key_id not in keys:
        known = ", ".join(keys) or "none"
        raise ReceiptError(f"key_id: {document.key_id[:KEY_ID_DIGITS]!r} is not the id of a given key ({known})")
    _check_signature(keys[document.key_id], document)
    payload = json.loads(document.payload)
    if payload["version"] != VERSION:
        raise ReceiptError(f"version: {payload['version']}, expected {VERSION}; use a newer llama2 command")
    if payload["request_sha256"] != _request_digest(document):
        raise ReceiptError("request: is not the request of this receipt")
    if payload["response_sha256"] != hashlib.sha256(document.response.encode()).hexdigest():
        raise ReceiptError("response: is not the text of this receipt")
    return _statement(document.key_id, payload)


def _statement(key_id: str, payload: dict[str, Any]) -> Statement:
    usage = payload["usage"]
    return Statement(
        key_id=key_id,
        seed=int(payload["seed"]),
        fingerprint=payload.get("fingerprint"),
        input_tokens=usage["input_tokens"],
        output_tokens=usage["output_tokens"],
        neurons=Decimal(payload["neurons"]),
        account=payload["account"],
        request_id=payload["request_id"],
        time=datetime.fromisoformat(payload["time"]),
    )


def _check_signature(raw_key: bytes, document: ReceiptDocument) -> None:
    try:
        from cryptography.exceptions import InvalidSignature  # an optional dependency
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError as error:
        raise ReceiptError(MISSING_EXTRA) from error
    try:
        Ed25519PublicKey.from_public_bytes(raw_key).verify(document.signature, SIGNED_PREFIX + document.payload)
    except (InvalidSignature, ValueError) as error:
        raise ReceiptError("signature: the payload was not signed with this key, or has changed since") from error


def _request_digest(document: ReceiptDocument) -> str:
    try:
        import rfc8785  # an optional dependency
    except ImportError as error:
        raise ReceiptError(MISSING_EXTRA) from error
    return hashlib.sha256(rfc8785.dumps(dict(document.request))).hexdigest()


def _pem_key(data: bytes) -> bytes:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # an optional dependency
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise ReceiptError(MISSING_EXTRA) from error
    key = load_pem_public_key(data)
    return key.public_bytes_raw() if isinstance(key, Ed25519PublicKey) else b""
