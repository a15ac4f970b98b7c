"""Receipts: what the server signs, the client verifies; nothing else is valid."""

import base64
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.support.receipts.vectors import KEYS, OTHER_KEYS, REQUESTS, STATEMENT, VECTORS, document_with, signed, text

from llama2.v1 import text_generation_pb2 as pb
from llama2_client.receipts import ReceiptError, verify_receipt
from llama2_client.receipts.document import signed_request
from llama2_server.receipts.receipt import Statement, sign

PUBLIC = [KEYS.public.raw]
RECEIPTS = 1000


def is_valid(document: dict[str, Any] | str | bytes) -> bool:
    """Return whether the client accepts a document."""
    try:
        verify_receipt(json.dumps(document) if isinstance(document, dict) else document, PUBLIC)
    except ReceiptError:
        return False
    return True


def test_the_vectors_are_the_bytes_that_a_server_signs() -> None:
    """A change of the format changes the file, which other languages test with, too."""
    assert VECTORS.read_text(encoding="ascii") == text()


@pytest.mark.parametrize("vector", json.loads(VECTORS.read_text())["vectors"], ids=lambda vector: str(vector["name"]))
def test_vectors(vector: dict[str, Any]) -> None:
    """The client accepts exactly the valid vectors."""
    assert is_valid(vector["document"]) == vector["valid"]


def test_a_statement_has_every_promised_part() -> None:
    """The payload has one form, and the client returns its values."""
    statement = replace(STATEMENT, request=signed_request(REQUESTS["every field"]), seed=2**64 - 1)
    payload = json.loads(sign(KEYS, statement).payload)
    assert payload.keys() == {
        *("version", "request_sha256", "response_sha256", "seed", "fingerprint", "usage", "neurons"),
        *("account", "time", "request_id"),
    }
    found = verify_receipt(json.dumps(signed(statement)), [OTHER_KEYS.public.raw, *PUBLIC])
    assert (found.seed, found.fingerprint, str(found.neurons)) == (2**64 - 1, statement.fingerprint, "7.7112")
    assert (found.input_tokens, found.output_tokens) == (12, 9)
    assert (found.account, found.request_id) == ("42", statement.request_id)
    assert found.time == statement.time.replace(microsecond=0)
    assert found.key_id == KEYS.public.key_id


def made_statements() -> Iterator[Statement]:
    """Yield statements about all kinds of requests and texts."""
    random_numbers = random.Random(0)
    alphabet = 'ab \n"\\é今🦙\u2028\x00'
    for _ in range(RECEIPTS):
        made = "".join(random_numbers.choices(alphabet, k=random_numbers.randrange(1, 40)))
        request = pb.GenerateRequest(prompt=made, temperature=random_numbers.random() * 5)
        if random_numbers.random() < 0.5:
            request.seed = random_numbers.getrandbits(64)
        yield replace(
            STATEMENT,
            request=signed_request(request),
            text=made[::-1] * random_numbers.randrange(1, 4),
            seed=random_numbers.getrandbits(64),
            time=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=random_numbers.randrange(10**8)),
        )


def changed_part(document: dict[str, Any], part: str, random_numbers: random.Random) -> dict[str, Any]:
    """Return the document with one changed byte or character in a part."""
    changed: dict[str, Any] = json.loads(json.dumps(document))
    if part in ("payload", "signature"):
        data = bytearray(base64.b64decode(changed["receipt"][part]))
        data[random_numbers.randrange(len(data))] ^= random_numbers.randrange(1, 256)
        return document_with(document, **{part: bytes(data)})
    owner, name = {
        "key_id": (changed["receipt"], "key_id"),
        "request": (changed["request"], "prompt"),
        "response": (changed, "response"),
    }[part]
    position = random_numbers.randrange(len(owner[name]))
    other = chr(ord(owner[name][position]) ^ 1)
    owner[name] = owner[name][:position] + other + owner[name][position + 1 :]
    return changed


def test_a_thousand_receipts_and_no_changed_one() -> None:
    """Each receipt is valid; with one changed byte in any part, none is."""
    random_numbers = random.Random(1)
    parts = itertools.cycle(("payload", "signature", "key_id", "request", "response"))
    for statement, part in zip(made_statements(), parts, strict=False):
        document = signed(statement)
        assert verify_receipt(json.dumps(document), PUBLIC).seed == statement.seed
        assert not is_valid(changed_part(document, part, random_numbers)), (part, document)


def test_every_byte_of_a_document_counts() -> None:
    """A document with another byte in any place is not valid, unless it is another spelling of the same JSON."""
    statement = replace(STATEMENT, request=signed_request(REQUESTS["every field"]))
    data = json.dumps(signed(statement), separators=(",", ":"), ensure_ascii=False).encode()
    assert is_valid(data)
    for position in range(len(data)):
        for bit in (1, 4, 32, 128):
            changed = bytearray(data)
            changed[position] ^= bit
            assert not is_valid(bytes(changed)) or json.loads(changed) == json.loads(data), bytes(changed)


DOCUMENTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a further member": lambda document: document.update(more=1),
    "no text": lambda document: document.pop("response"),
    "a further member of the receipt": lambda document: document["receipt"].update(more=1),
    "an unknown field of the request": lambda document: document["request"].update(more=1),
    "camel case": lambda document: document["request"].update(topK=1),
    "a number as a text": lambda document: document["request"].update(max_tokens="100"),
    "a text of the wrong type": lambda document: document.update(response=1),
    "base64 with other unused bits": lambda document: document["receipt"].update(
        signature=document["receipt"]["signature"].removesuffix("==")[:-1] + "/=="
    ),
    "base64 with a line break": lambda document: document["receipt"].update(
        signature=document["receipt"]["signature"][:10] + "\n" + document["receipt"]["signature"][10:]
    ),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_of_another_form(name: str) -> None:
    """A document has one form, so that no part of it is outside the proof."""
    document = signed(replace(STATEMENT, request=signed_request(REQUESTS["every field"])))
    DOCUMENTS[name](document)
    assert not is_valid(document)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b'{"request":', b"\xff", b'{"response":"","response":""}', b"[" * 10**5]
)
def test_other_data_is_rejected_in_one_line(data: bytes) -> None:
    """Files that are no documents are errors with a reason."""
    with pytest.raises(ReceiptError) as raised:
        verify_receipt(data, PUBLIC)
    assert "\n" not in str(raised.value)
