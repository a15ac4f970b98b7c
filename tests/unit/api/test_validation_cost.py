"""What bounds the cost of a rejected request: which work is done before it is rejected."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jsonschema
import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.unit.api.requests import CARD, assistant, user

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.api.validation import request_validator
from llama2_server.api.validation.bounds import min_turn_tokens
from llama2_server.api.validation.card_schema import MAX_VIOLATIONS, CardSchema
from llama2_server.api.validation.quick_proof import quick_proof
from llama2_server.api.validation.request_validator import RequestValidator
from llama2_server.engine.text.tokenizer import ChatMessage, Tokenizer
from llama2_server.errors import InvalidRequest

LONG_CONVERSATION = [user("a"), assistant("b")] * 200 + [user("c")]


class CountingList(list[Any]):
    """A list that counts the items that its readers have taken."""

    taken = 0

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self.taken += 1
            yield item


@pytest.fixture(scope="session")
def of_7b(demo_tokenizer: Tokenizer) -> RequestValidator:
    """A validator with the limits of the 7B's card."""
    return RequestValidator(CARD, demo_tokenizer)


@pytest.mark.parametrize(
    "request_",
    [
        pb.GenerateRequest(messages=[pb.ChatMessage()] * 1023),
        pb.GenerateRequest(prompt="a", stop=["a"] * 300_000),
        pb.CountTokensRequest(messages=[pb.ChatMessage()] * 1023),
    ],
    ids=["messages", "stop", "messages of CountTokens"],
)
def test_counts_are_bounded_before_the_request_becomes_json(
    of_7b: RequestValidator, monkeypatch: pytest.MonkeyPatch, request_: Any
) -> None:
    """Too many entries are rejected without a conversion to JSON, and on the event loop."""
    converted: list[Any] = []

    def convert(message: Any, **options: Any) -> Any:
        converted.append(message)
        return MessageToDict(message, **options)

    monkeypatch.setattr(request_validator, "MessageToDict", convert)
    assert not of_7b.is_costly(request_)
    generates = isinstance(request_, pb.GenerateRequest)
    validate = partial(of_7b.validate_generate, streaming=False) if generates else of_7b.validate_count_tokens
    with pytest.raises(InvalidRequest):
        validate(request_)
    assert converted == []


def test_validation_stops_after_the_violations_that_it_lists(of_7b: RequestValidator) -> None:
    """An error has MAX_VIOLATIONS violations at most, and says that the request can have more."""
    with pytest.raises(InvalidRequest) as rejected:
        of_7b.validate_generate(pb.GenerateRequest(messages=[pb.ChatMessage()] * 400), streaming=False)
    assert len(rejected.value.violations) == MAX_VIOLATIONS
    assert str(rejected.value).endswith(f"(and at least {MAX_VIOLATIONS} more)")
    (bad_request,) = rejected.value.details()
    last = bad_request.field_violations[-1]  # type: ignore[attr-defined]
    assert (last.field, last.description) == ("", "further violations are not listed")


def test_exactly_as_many_violations_as_are_listed(of_7b: RequestValidator) -> None:
    """An error with MAX_VIOLATIONS violations that are all says nothing of others."""
    messages = [pb.ChatMessage()] * (MAX_VIOLATIONS // 2)
    with pytest.raises(InvalidRequest, match=f"and {MAX_VIOLATIONS - 1} more") as rejected:
        of_7b.validate_generate(pb.GenerateRequest(messages=messages), streaming=False)
    assert len(rejected.value.violations) == MAX_VIOLATIONS


def test_the_schema_visits_few_invalid_messages() -> None:
    """The schema's errors end soon after MAX_VIOLATIONS, wherever the invalid messages are."""
    messages = CountingList([{}] * 3000)
    found = list(CardSchema(CARD.input_schema).violations({"messages": messages}))
    assert MAX_VIOLATIONS < len(found) <= MAX_VIOLATIONS + 1
    assert messages.taken <= MAX_VIOLATIONS + 1


def test_jsonschema_does_not_run_on_valid_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keywords of a message run for the one message that is not valid, and not for the 400 others."""
    checked: list[Any] = []
    schema = CardSchema(CARD.input_schema)
    check_required = jsonschema.Draft202012Validator.VALIDATORS["required"]

    def required(validator: Any, names: Any, instance: Any, subschema: Any) -> Any:
        checked.append(instance)
        return check_required(validator, names, instance, subschema)

    monkeypatch.setitem(schema._validator.VALIDATORS, "required", required)
    messages = [{"role": "user", "content": "a"}] * 400 + [{"role": "user"}]
    assert [one.field for one in schema.violations({"messages": messages})] == ["messages[400].content"]
    assert [item for item in checked if "messages" not in item] == [{"role": "user"}]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a", "max_tokens": 5, "raw": True},
        {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "stream": True},
    ],
    ids=["prompt", "messages"],
)
def test_jsonschema_does_not_run_on_a_valid_body(monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]) -> None:
    """Most rejected calls have a valid body, which costs little under overload."""
    schema = CardSchema(CARD.input_schema)
    monkeypatch.setattr(schema, "_validator", None)
    assert list(schema.violations(body)) == []


def test_a_conversation_beyond_the_context_is_encoded_only_so_far(
    demo_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding stops with the turn that exceeds the context."""
    encoded: list[str] = []
    encode_raw = Tokenizer.encode_raw

    def encode(tokenizer: Tokenizer, text: str) -> list[int]:
        encoded.append(text)
        return encode_raw(tokenizer, text)

    validator = RequestValidator(CARD.model_copy(update={"context_length_limit": 1000}), demo_tokenizer)
    monkeypatch.setattr(Tokenizer, "encode_raw", encode)
    messages = [user("a short question"), assistant("b c d e f g h")] * 80 + [user("c")]
    with pytest.raises(InvalidRequest, match="has at least 10"):
        validator.validate_generate(pb.GenerateRequest(messages=messages), streaming=False)
    assert len(encoded) < 60


def test_long_requests_are_costly(of_7b: RequestValidator) -> None:
    """A long conversation is validated in another thread; a prompt of the longest size is not."""
    assert of_7b.is_costly(pb.GenerateRequest(messages=LONG_CONVERSATION))
    assert of_7b.is_costly(pb.GenerateRequest(messages=[user("a" * 4096)] * 3))
    assert not of_7b.is_costly(pb.GenerateRequest(prompt="a" * 4096))


TEXTS = st.text(alphabet=st.sampled_from(" []/INSTSYab\n."), max_size=12)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, min_size=3, max_size=9).filter(lambda texts: len(texts) % 2 == 1))
def test_no_turn_has_fewer_tokens_than_the_bound(demo_tokenizer: Tokenizer, texts: list[str]) -> None:
    """The bound on the number of messages never rejects a conversation that fits."""
    messages = [ChatMessage("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]
    assert min_turn_tokens(demo_tokenizer) > 2
    tokens = len(demo_tokenizer.encode_chat(messages))
    assert tokens >= (len(messages) - 1) // 2 * min_turn_tokens(demo_tokenizer)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 5), st.just(1.0), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["role", "content", "n"]), inner)
    ),
)
SCHEMAS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["string", "boolean", "integer", "object", "number", "array"]),
        "maxLength": st.integers(0, 3),
        "required": st.lists(st.sampled_from(["role", "content"]), unique=True),
        "properties": st.dictionaries(
            st.sampled_from(["role", "content"]),
            st.fixed_dictionaries({"type": st.sampled_from(["string", "integer"])}, optional={"maxLength": st.just(2)}),
        ),
        "minLength": st.just(1),
        "items": st.fixed_dictionaries({}, optional={"type": st.sampled_from(["string", "integer"])}),
    },
)
ALTERNATIVES = st.builds(
    lambda schema, branches: {**schema, "oneOf": branches}, SCHEMAS, st.lists(SCHEMAS, min_size=1, max_size=3)
)


@settings(max_examples=500, deadline=None)
@given(schema=st.one_of(SCHEMAS, ALTERNATIVES), value=VALUES)
@example(schema={"oneOf": [{"required": ["role"]}, {"required": ["content"]}]}, value={"role": 1, "content": 1})
@example(schema={"oneOf": [{"required": ["role"]}, {"required": ["content"]}]}, value=1)
@example(schema={"oneOf": [{"type": "object"}, {"required": ["content"]}]}, value={"content": 1})
def test_what_is_proven_is_valid(schema: dict[str, Any], value: Any) -> None:
    """A quick proof is true only for values that jsonschema accepts."""
    proof = quick_proof(schema)
    if proof is not None and proof(value):
        assert jsonschema.Draft202012Validator(schema).is_valid(value)
