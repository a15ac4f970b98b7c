"""The document of a receipt: the request, the text and the receipt itself, as JSON."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from llama2.v1 import text_generation_pb2
from llama2_client.reply import Reply

# Fields that change how a reply is sent, but not the reply; a receipt does not cover them.
UNSIGNED_FIELDS = frozenset(("idempotency_key", "resume_after_characters", "stream", "no_cache"))


class ReceiptError(Exception):
    """A receipt that is not valid, or a document without one; the one-line message has the reason."""


@dataclass(frozen=True, slots=True)
class ReceiptDocument:
    """What a verifier needs, except the public key."""

    request: Mapping[str, Any]
    """The request in protobuf's JSON form, with original field names and without UNSIGNED_FIELDS."""
    response: str
    key_id: str
    payload: bytes
    signature: bytes

    @classmethod
    def parse(cls, data: bytes | str) -> ReceiptDocument:
        """Return the document of a JSON text.

        Raises:
            ReceiptError: it is not JSON, or has not exactly the members of a document in their one form.
        """
        try:
            members = json.loads(data, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise ReceiptError(f"not a JSON document: {error}") from error
        request, response, receipt = _members("the document", members, request=dict, response=str, receipt=dict)
        key_id, payload, signature = _members("receipt", receipt, key_id=str, payload=str, signature=str)
        if request != signed_request(_parse_request(request)):
            raise ReceiptError("request: has another form than the server signed, or a field that a receipt omits")
        return cls(request, response, key_id, _bytes("payload", payload), _bytes("signature", signature))


def receipt_document(reply: Reply) -> str:
    """Return the document of a reply's receipt as JSON text.

    Raises:
        ReceiptError: the server sent no receipt with this reply.
    """
    receipt = reply.completion.receipt
    if reply.request is None or not receipt.payload:
        raise ReceiptError("the reply has no receipt; the server makes receipts only with --receipt-key")
    members = {
        "request": signed_request(reply.request),
        "response": reply.text,
        "receipt": {
            "key_id": receipt.key_id,
            "payload": base64.b64encode(receipt.payload).decode(),
            "signature": base64.b64encode(receipt.signature).decode(),
        },
    }
    return json.dumps(members, ensure_ascii=False, indent=2) + "\n"


def signed_request(request: text_generation_pb2.GenerateRequest) -> dict[str, Any]:
    """Return the JSON form of a request without UNSIGNED_FIELDS."""
    fields = MessageToDict(request, preserving_proto_field_name=True)
    return {name: value for name, value in fields.items() if name not in UNSIGNED_FIELDS}


def _parse_request(fields: dict[str, Any]) -> text_generation_pb2.GenerateRequest:
    try:
        return ParseDict(fields, text_generation_pb2.GenerateRequest())
    except (ParseError, ValueError, TypeError, RecursionError) as error:
        raise ReceiptError(f"request: not a GenerateRequest: {' '.join(str(error).split())}") from error


def _members(subject: str, value: object, **kinds: type) -> list[Any]:
    """Return the members of an object that has exactly these, each of its kind."""
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise ReceiptError(f"{subject}: must have exactly the members {', '.join(kinds)}")
    for name, kind in kinds.items():
        if not isinstance(value[name], kind):
            raise ReceiptError(f"{name}: has the wrong type")
    return [value[name] for name in kinds]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a member occurs twice")
    return members


def _bytes(name: str, text: str) -> bytes:
    """Return the bytes of a base64 text in its one form."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ReceiptError(f"{name}: not base64: {error}") from error
    if base64.b64encode(data).decode() != text:
        raise ReceiptError(f"{name}: not in base64's one form")
    return data
