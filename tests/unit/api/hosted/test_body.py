"""The JSON body of the hosted endpoint: fields, types and the card's schema."""

import json
from typing import Any

import pytest

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.api.hosted.body import BodyParser
from llama2_server.card import load_card
from llama2_server.errors import InvalidRequest

PARSER = BodyParser(load_card("llama-2-7b-chat-fp16"))
USER = {"role": "user", "content": "Hi"}
NOT_AN_OBJECT = {"": "the body must be one JSON object, in UTF-8"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "é\u2028"}, pb.GenerateRequest(prompt="é\u2028")),
        ({"messages": [USER], "stream": True}, pb.GenerateRequest(messages=[pb.ChatMessage(**USER)], stream=True)),
        ({"prompt": "Hi", "max_tokens": None, "seed": 2**64 - 1}, pb.GenerateRequest(prompt="Hi", seed=2**64 - 1)),
        ({"prompt": "Hi", "lora": "x", "maxTokens": 1, "tools": [{}]}, pb.GenerateRequest(prompt="Hi")),
        ({"messages": [USER | {"name": "x"}]}, pb.GenerateRequest(messages=[pb.ChatMessage(**USER)])),
        (
            {"prompt": "Hi", "top_k": 5, "top_p": 1, "stop": ["."]},
            pb.GenerateRequest(prompt="Hi", top_k=5, top_p=1, stop=["."]),
        ),
    ],
)
def test_fields(body: dict[str, Any], expected: pb.GenerateRequest) -> None:
    """Fields have the names of GenerateRequest; null is unset, and other fields are ignored."""
    assert PARSER.parse(json.dumps(body).encode()) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, {"prompt": "either prompt or messages is required"}),
        ({"prompt": 5}, {"prompt": "must be of type string"}),
        ({"prompt": ["x"]}, {"prompt": "must be of type string"}),
        ({"prompt": "x" * 4097}, {"prompt": "must have at most 4096 characters, got 4097"}),
        ({"prompt": "x", "max_tokens": "5"}, {"max_tokens": "must be of type integer"}),
        ({"prompt": "x", "max_tokens": 2**40}, {"max_tokens": "must be of type integer, in 32 bits"}),
        (
            {"prompt": "x", "raw": "yes", "stream": 1},
            dict.fromkeys(("raw", "stream"), "must be of type boolean"),
        ),
        (
            {"prompt": "x", "temperature": "hot", "seed": -1, "stop": [1], "top_k": 0.5},
            {
                "temperature": "must be of type number",
                "seed": "must be of type integer, not negative, in 64 bits",
                "stop": "must be an array of type string",
                "top_k": "must be of type integer, in 32 bits",
            },
        ),
        ({"messages": "x"}, {"messages": "must be of type array"}),
        ({"messages": [7]}, {"messages[0]": "must be of type object"}),
        (
            {"messages": [USER, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
            {"messages[1].content": "must be of type string"},
        ),
        (
            {"messages": [{"content": None}]},
            {"messages[0].role": "is required", "messages[0].content": "must be of type string"},
        ),
        ({"messages": [7] * 200_000}, {"messages": "must have at most 3072 entries, got 200000"}),
    ],
)
def test_violations(body: dict[str, Any], expected: dict[str, str]) -> None:
    """Each violation of the schema and of the types has the path of its field, and quotes no value."""
    assert violations(json.dumps(body).encode()) == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'"x"',
        b'{"prompt": "x"',
        b'{"prompt": "x"} {}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "x", "temperature": NaN}',
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_other_bodies(body: bytes) -> None:
    """Anything except one JSON object in valid Unicode gets one violation without a field."""
    assert violations(body) == NOT_AN_OBJECT


def violations(body: bytes) -> dict[str, str]:
    """Return the violations of a rejected body by field."""
    with pytest.raises(InvalidRequest) as caught:
        PARSER.parse(body)
    return dict(caught.value.violations)
