"""Mutants of fingerprints and receipts. A mutant that changes a payload cannot sign it again."""

import hashlib
import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from google.protobuf.json_format import MessageToDict

from conformance.mutants.behavior import GENERATION, Call, on_reply
from conformance.server_runner.receipts import canonical

CARD = "GetModelCard"


@on_reply()
def no_fingerprint(call: Call, reply: Any) -> None:
    """Returns no fingerprint."""
    reply.completion.ClearField("fingerprint") if reply.HasField("completion") else None


@on_reply()
def fingerprint_is_short(call: Call, reply: Any) -> None:
    """Returns the first 16 digits of the fingerprint."""
    if reply.HasField("completion"):
        reply.completion.fingerprint = reply.completion.fingerprint[:16]


@on_reply("GenerateStream")
def stream_has_another_fingerprint(call: Call, reply: Any) -> None:
    """Returns another fingerprint with a stream."""
    if reply.HasField("completion"):
        reply.completion.fingerprint = reply.completion.fingerprint[::-1]


@on_reply(CARD)
def card_has_another_fingerprint(call: Call, reply: Any) -> None:
    """The card has another fingerprint than the replies."""
    reply.execution.fingerprint = reply.execution.fingerprint[::-1]


@on_reply(CARD)
def card_has_no_fingerprint(call: Call, reply: Any) -> None:
    """The card has no fingerprint."""
    reply.execution.ClearField("fingerprint")


@on_reply()
def fingerprint_has_the_seed(call: Call, reply: Any) -> None:
    """The fingerprint depends on the seed of the request."""
    if reply.HasField("completion") and call.request.HasField("seed"):
        text = f"{reply.completion.fingerprint} {call.request.seed}"
        reply.completion.fingerprint = hashlib.sha256(text.encode()).hexdigest()


@on_reply()
def fingerprint_has_the_account(call: Call, reply: Any) -> None:
    """The fingerprint depends on the account."""
    if reply.HasField("completion") and call.role == "other":
        reply.completion.fingerprint = reply.completion.fingerprint[::-1]


@on_reply(CARD)
def card_without_inputs(call: Call, reply: Any) -> None:
    """The card does not list what the fingerprint names."""
    del reply.execution.fingerprint_inputs[:]


@on_reply(CARD)
def inputs_are_not_sorted(call: Call, reply: Any) -> None:
    """The inputs of the fingerprint are not sorted."""
    reply.execution.fingerprint_inputs.sort(key=lambda one: one.name, reverse=True)


@on_reply()
def cached_without_fingerprint(call: Call, reply: Any) -> None:
    """Returns no fingerprint with a cached reply."""
    if reply.completion.cached:
        reply.completion.ClearField("fingerprint")


@on_reply()
def no_receipt(call: Call, reply: Any) -> None:
    """Returns no receipt."""
    reply.completion.ClearField("receipt") if reply.HasField("completion") else None


@on_reply()
def receipt_of_another_key(call: Call, reply: Any) -> None:
    """The receipt has the id of another key."""
    if reply.HasField("completion"):
        reply.completion.receipt.key_id = "0" * 16


@on_reply()
def receipt_with_wrong_signature(call: Call, reply: Any) -> None:
    """The signature is that of another payload."""
    if reply.HasField("completion"):
        signature = reply.completion.receipt.signature
        reply.completion.receipt.signature = bytes([signature[0] ^ 1]) + signature[1:]


@on_reply(CARD)
def card_lists_no_keys(call: Call, reply: Any) -> None:
    """The card lists no public key."""
    del reply.receipt_keys[:]


@on_reply(f"{CARD} {GENERATION}")
def key_has_a_name(call: Call, reply: Any) -> None:
    """The id of the key does not follow from the public key."""
    for key in reply.receipt_keys if call.method == CARD else ():
        key.key_id = "key"
    if call.method != CARD and reply.HasField("completion"):
        reply.completion.receipt.key_id = "key"


def _changes_payload(name: str, behavior: str, change: Callable[[Call, Any, dict[str, Any]], None]) -> None:
    def change_payload(call: Call, reply: Any) -> None:
        call.memory["text"] = call.memory.get("text", "") + reply.response
        if reply.HasField("completion") and reply.completion.receipt.payload:
            payload = json.loads(reply.completion.receipt.payload)
            change(call, reply, payload)
            reply.completion.receipt.payload = canonical(payload)

    change_payload.__name__, change_payload.__doc__ = name, behavior
    on_reply()(change_payload)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _whole_request(call: Call, reply: Any, payload: dict[str, Any]) -> None:
    payload["request_sha256"] = _digest(canonical(MessageToDict(call.request, preserving_proto_field_name=True)))


def _utf_16(call: Call, reply: Any, payload: dict[str, Any]) -> None:
    payload["response_sha256"] = _digest(call.memory["text"].encode("utf-16-le"))


def _last_delta(call: Call, reply: Any, payload: dict[str, Any]) -> None:
    payload["response_sha256"] = _digest(reply.response.encode())


def _rounded_price(call: Call, reply: Any, payload: dict[str, Any]) -> None:
    payload["neurons"] = str(round(Decimal(payload["neurons"]), 2))


def _seed_as_number(call: Call, reply: Any, payload: dict[str, Any]) -> None:
    payload["seed"] = int(payload["seed"])


def _time_with_offset(call: Call, reply: Any, payload: dict[str, Any]) -> None:
    payload["time"] = payload["time"].replace("Z", "+00:00")


def _no_account(call: Call, reply: Any, payload: dict[str, Any]) -> None:
    del payload["account"]


def _price_of_cached(call: Call, reply: Any, payload: dict[str, Any]) -> None:
    usage = reply.completion.usage
    payload["neurons"] = str(Decimal("0.3672") * (usage.input_tokens + usage.output_tokens))


_changes_payload("receipt_of_whole_request", "The digest covers the fields that a receipt omits.", _whole_request)
_changes_payload("receipt_digests_utf_16", "The digest of the text is that of UTF-16.", _utf_16)
_changes_payload("receipt_of_last_message", "The digest is that of the last message's text.", _last_delta)
_changes_payload("receipt_rounds_price", "The receipt has a rounded price.", _rounded_price)
_changes_payload("receipt_has_seed_as_number", "The receipt has the seed as a number.", _seed_as_number)
_changes_payload("receipt_has_time_with_offset", "The receipt has the time with an offset.", _time_with_offset)
_changes_payload("receipt_without_account", "The receipt does not name the account.", _no_account)
_changes_payload("cached_receipt_has_price", "The receipt of a cached reply has its first price.", _price_of_cached)


@on_reply()
def receipt_has_spaces(call: Call, reply: Any) -> None:
    """The payload has spaces between its members."""
    if reply.HasField("completion") and reply.completion.receipt.payload:
        payload = json.loads(reply.completion.receipt.payload)
        reply.completion.receipt.payload = json.dumps(payload, sort_keys=True).encode()


@on_reply()
def cached_reply_has_first_receipt(call: Call, reply: Any) -> None:
    """A cached reply has the receipt of the first one."""
    if reply.HasField("completion"):
        first = call.state.setdefault("receipt", reply.completion.receipt)
        if reply.completion.cached:
            reply.completion.receipt.CopyFrom(first)
