"""Validation agrees with the card's JSON Schema, apart from the exceptions that text_generation.proto lists."""

import json
from typing import Any

import jsonschema
import pytest
from google.protobuf import json_format
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.unit.api.requests import CARD

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.api.validation.request_validator import RequestValidator
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.errors import InvalidRequest

SCHEMA = jsonschema.Draft202012Validator(json.loads(CARD.input_schema))
ROLES = ("system", "user", "assistant")
TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


@pytest.fixture(scope="session")
def unlimited(demo_tokenizer: Tokenizer) -> RequestValidator:
    """A validator without effective token limits, so that only the schema and the rules decide."""
    limits = {"context_length_limit": 2**40, "sequence_length_limit": 2**31 - 1}
    return RequestValidator(CARD.model_copy(update=limits), demo_tokenizer)


# Values for any field of a request: valid, almost valid and clearly invalid.
UNITS = st.sampled_from(["a", "😀", "e\u0301", "字", "👩‍👩‍👧"])
LENGTHS = st.sampled_from([0, 1, 2, 17, 4095, 4096, 4097])
TEXTS = st.one_of(
    st.builds(lambda unit, length: (unit * length)[:length], UNITS, LENGTHS),
    st.text(max_size=20),
    st.sampled_from(["", " ", "hello", "[INST] hello", "a <<SYS>> b", "<s>", "</s>", "[inst]"]),
)
INVALID = st.one_of(st.none(), st.booleans(), st.integers(-2, 5), st.floats(allow_nan=False), st.just([]), st.just({}))
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.one_of(st.sampled_from([*ROLES, "user", "user", "tool", "User", ""]), INVALID),
        "content": st.one_of(TEXTS, TEXTS, INVALID),
        "name": st.one_of(TEXTS, INVALID),
    },
)
VALID_CHATS = st.builds(
    lambda system, turns, texts: [
        {"role": role, "content": text}
        for role, text in zip([*["system"][:system], *["user", "assistant"] * turns, "user"], texts, strict=False)
    ],
    st.integers(0, 1),
    st.integers(0, 2),
    st.lists(TEXTS, min_size=6, max_size=6),
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.one_of(TEXTS, TEXTS, INVALID),
        "messages": st.one_of(VALID_CHATS, VALID_CHATS, st.lists(MESSAGES, max_size=4), INVALID),
        "raw": st.one_of(st.booleans(), INVALID),
        "stream": st.one_of(st.booleans(), INVALID),
        "max_tokens": st.one_of(st.integers(-1, 3000), st.sampled_from([256.0, 1.5, 2**31, 10**30, "256"]), INVALID),
        "unknown_field": st.one_of(TEXTS, INVALID),
    },
)


def accepts(validator: RequestValidator, body: Any) -> bool:
    """Return whether protobuf and the validator accept a JSON body."""
    try:
        request = json_format.Parse(json.dumps(body), pb.GenerateRequest(), ignore_unknown_fields=True)
        validator.validate_generate(request, streaming=request.stream)
    except (json_format.ParseError, InvalidRequest):
        return False
    return True


def schema_accepts(body: dict[str, Any]) -> bool:
    """Return whether the schema accepts a body, apart from the exceptions that text_generation.proto lists."""
    # Accepted, although the schema rejects it: null and, next to a prompt, [] mean unset; a quoted integer is a number.
    body = {key: value for key, value in body.items() if value is not None}
    if isinstance(body.get("max_tokens"), str) and body["max_tokens"].isdecimal():
        body["max_tokens"] = int(body["max_tokens"])
    if "prompt" in body and body.get("messages") == []:
        del body["messages"]
    if not SCHEMA.is_valid(body):
        return False
    # Rejected, although the schema accepts it.
    messages = body.get("messages")
    texts = [body["prompt"]] if "prompt" in body else [message["content"] for message in messages or []]
    return not (
        messages == []
        or not 1 <= body.get("max_tokens", 1) < 2**31
        or ("prompt" in body and "messages" in body)
        or (messages is not None and body.get("raw", False) is not False)
        or (messages is not None and not template_can_express([message["role"] for message in messages]))
        or (not body.get("raw") and any(tag in text for tag in TAGS for text in texts))
    )


def template_can_express(roles: list[str]) -> bool:
    turns = roles[1:] if roles[:1] == ["system"] else roles
    return len(turns) % 2 == 1 and turns == (["user", "assistant"] * len(turns))[: len(turns)]


@settings(max_examples=1500, deadline=None)
@given(body=BODIES)
@example(body={"prompt": "😀" * 4096})
@example(body={"prompt": "😀" * 4097})
@example(body={"prompt": "e\u0301" * 2048})
@example(body={"prompt": "x", "messages": 5})
@example(body={"messages": [{"role": "user", "content": "x"}], "raw": "yes"})
@example(body={"prompt": "x", "messages": []})
@example(body={"messages": []})
@example(body={"prompt": "[INST]", "raw": True})
def test_validator_agrees_with_the_schema(unlimited: RequestValidator, body: dict[str, Any]) -> None:
    """For any JSON body, the result equals that of jsonschema with the card's schema, documented exceptions aside."""
    assert accepts(unlimited, body) == schema_accepts(body)


def test_lone_surrogate_is_rejected(unlimited: RequestValidator) -> None:
    """Text that is not valid Unicode passes the schema, and protobuf rejects it, as documented."""
    assert SCHEMA.is_valid({"prompt": "\ud800"})
    assert not accepts(unlimited, {"prompt": "\ud800"})
