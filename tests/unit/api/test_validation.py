"""Validation: equal to the card's JSON Schema but for the exceptions that the proto lists, and clear in its words."""

import json
from typing import Any

import jsonschema
import pytest
from google.protobuf import json_format
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.api.validation import RequestValidator
from llama2_server.card import ModelCard, load_card
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.errors import InvalidRequest, Violation

CARD = load_card("llama-2-7b-chat-fp16")
SCHEMA = jsonschema.Draft202012Validator(json.loads(CARD.input_schema))
ROLES = ("system", "user", "assistant")
TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


@pytest.fixture(scope="session")
def boundless(demo_tokenizer: Tokenizer) -> RequestValidator:
    """A validator whose token limits never speak: only the schema and the rules decide."""
    limits = {"context_length_limit": 2**40, "sequence_length_limit": 2**31 - 1}
    return RequestValidator(CARD.model_copy(update=limits), demo_tokenizer)


@pytest.fixture(scope="session")
def small_card() -> ModelCard:
    """A card with room for 60 tokens, 40 of them generated."""
    return CARD.model_copy(update={"context_length_limit": 60, "sequence_length_limit": 40, "default_max_tokens": 30})


@pytest.fixture(scope="session")
def validator(small_card: ModelCard, demo_tokenizer: Tokenizer) -> RequestValidator:
    return RequestValidator(small_card, demo_tokenizer)


# What a caller may put into any field: right, nearly right, and plainly wrong.
UNITS = st.sampled_from(["a", "😀", "e\u0301", "字", "👩‍👩‍👧"])
LENGTHS = st.sampled_from([0, 1, 2, 17, 4095, 4096, 4097])
TEXTS = st.one_of(
    st.builds(lambda unit, length: (unit * length)[:length], UNITS, LENGTHS),
    st.text(max_size=20),
    st.sampled_from(["", " ", "hello", "[INST] hello", "a <<SYS>> b", "<s>", "</s>", "[inst]"]),
)
WRONG = st.one_of(st.none(), st.booleans(), st.integers(-2, 5), st.floats(allow_nan=False), st.just([]), st.just({}))
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.one_of(st.sampled_from([*ROLES, "user", "user", "tool", "User", ""]), WRONG),
        "content": st.one_of(TEXTS, TEXTS, WRONG),
        "name": st.one_of(TEXTS, WRONG),
    },
)
GOOD_CHATS = st.builds(
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
        "prompt": st.one_of(TEXTS, TEXTS, WRONG),
        "messages": st.one_of(GOOD_CHATS, GOOD_CHATS, st.lists(MESSAGES, max_size=4), WRONG),
        "raw": st.one_of(st.booleans(), WRONG),
        "stream": st.one_of(st.booleans(), WRONG),
        "max_tokens": st.one_of(st.integers(-1, 3000), st.sampled_from([256.0, 1.5, 2**31, 10**30, "256"]), WRONG),
        "unknown_field": st.one_of(TEXTS, WRONG),
    },
)


def our_verdict(validator: RequestValidator, body: Any) -> bool:
    try:
        request = json_format.Parse(json.dumps(body), pb.GenerateRequest(), ignore_unknown_fields=True)
        validator.validate_generate(request, streaming=request.stream)
    except (json_format.ParseError, InvalidRequest):
        return False
    return True


def documented_verdict(body: dict[str, Any]) -> bool:
    """The schema's verdict, changed by the exceptions that text_generation.proto lists, in its order."""
    # Accepted although the schema refuses: null is unset, a quoted whole number is one, [] beside a prompt is unset.
    body = {key: value for key, value in body.items() if value is not None}
    if isinstance(body.get("max_tokens"), str) and body["max_tokens"].isdecimal():
        body["max_tokens"] = int(body["max_tokens"])
    if "prompt" in body and body.get("messages") == []:
        del body["messages"]
    if not SCHEMA.is_valid(body):
        return False
    # Refused although the schema accepts.
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
def test_verdict_is_the_schemas(boundless: RequestValidator, body: dict[str, Any]) -> None:
    """For any JSON body our verdict is jsonschema's on the card, but for the documented exceptions."""
    assert our_verdict(boundless, body) == documented_verdict(body)


def test_lone_surrogate_is_refused(boundless: RequestValidator) -> None:
    """Text that is not Unicode passes the schema and is refused by protobuf, as documented."""
    assert SCHEMA.is_valid({"prompt": "\ud800"})
    assert not our_verdict(boundless, {"prompt": "\ud800"})


def user(content: str) -> pb.ChatMessage:
    return pb.ChatMessage(role="user", content=content)


def assistant(content: str) -> pb.ChatMessage:
    return pb.ChatMessage(role="assistant", content=content)


def violations(validator: RequestValidator, request: pb.GenerateRequest, streaming: bool = False) -> list[Violation]:
    with pytest.raises(InvalidRequest) as refused:
        validator.validate_generate(request, streaming=streaming)
    return list(refused.value.violations)


@pytest.mark.parametrize(
    ("request_", "field", "words"),
    [
        (pb.GenerateRequest(), "prompt", "either prompt or messages is required"),
        (pb.GenerateRequest(prompt="a", messages=[user("b")]), "prompt", "only one of prompt and messages"),
        (pb.GenerateRequest(prompt="😀" * 4097), "prompt", "at most 4096 characters, got 4097"),
        (pb.GenerateRequest(prompt="a [/INST] b"), "prompt", "control tags"),
        (pb.GenerateRequest(messages=[user("x" * 5000)]), "messages[0].content", "at most 4096 characters, got 5000"),
        (pb.GenerateRequest(messages=[pb.ChatMessage(role="user")]), "messages[0].content", "is required"),
        (pb.GenerateRequest(messages=[pb.ChatMessage(content="a")]), "messages[0].role", "is required"),
        (pb.GenerateRequest(messages=[pb.ChatMessage(role="tool", content="")]), "messages[0].role", "system, user or"),
        (pb.GenerateRequest(messages=[user("a"), user("b")]), "messages[1].role", "must be assistant here"),
        (pb.GenerateRequest(messages=[user("a"), assistant("b")]), "messages[1].role", "in the last message"),
        (pb.GenerateRequest(messages=[pb.ChatMessage(role="system", content="a")]), "messages[0].role", "must be user"),
        (pb.GenerateRequest(messages=[user("<<SYS>>")]), "messages[0].content", "control tags"),
        (pb.GenerateRequest(messages=[user("a")], raw=True), "raw", "cannot be true with messages"),
        (pb.GenerateRequest(prompt="a", stream=True), "stream", "call GenerateStream instead"),
        (pb.GenerateRequest(prompt="a", max_tokens=0), "max_tokens", "in [1, 40], got 0"),
        (pb.GenerateRequest(prompt="a", max_tokens=41), "max_tokens", "in [1, 40], got 41"),
        (pb.GenerateRequest(prompt="a", temperature=5.5), "temperature", "in [0, 5], got 5.5"),
        (pb.GenerateRequest(prompt="a", temperature=float("nan")), "temperature", "got nan"),
        (pb.GenerateRequest(prompt="a", top_p=0), "top_p", "in (0, 1], got 0"),
        (pb.GenerateRequest(prompt="a", top_k=-1), "top_k", "0 or more, got -1"),
        (pb.GenerateRequest(prompt="a", repetition_penalty=0), "repetition_penalty", "in (0, 2]"),
        (pb.GenerateRequest(prompt="a", frequency_penalty=-3), "frequency_penalty", "in [-2, 2]"),
        (pb.GenerateRequest(prompt="a", presence_penalty=3), "presence_penalty", "in [-2, 2]"),
        (pb.GenerateRequest(prompt="a", stop=list("abcde")), "stop", "at most 4 entries, got 5"),
        (pb.GenerateRequest(prompt="a", stop=["a", ""]), "stop[1]", "1 to 256 characters, got 0"),
        (pb.GenerateRequest(prompt="many words " * 30), "prompt", "the context has 60 for prompt and"),
        (
            pb.GenerateRequest(messages=[user("many words " * 30)]),
            "messages",
            "the context has 60 for prompt and",
        ),
        (pb.GenerateRequest(prompt="word " * 800), "prompt", "has at least"),
        # One violation, not one for each: to look at as many as fit a message would take the server half a minute.
        (pb.GenerateRequest(messages=[pb.ChatMessage()] * 61), "messages", "has at least 61 tokens"),
    ],
)
def test_violation_names_field_and_rule(
    validator: RequestValidator, request_: pb.GenerateRequest, field: str, words: str
) -> None:
    """Each broken rule is one violation with the field's path and what is allowed."""
    found = violations(validator, request_)
    assert [violation.field for violation in found] == [field]
    assert words in found[0].description


def test_all_violations_come_at_once(validator: RequestValidator) -> None:
    """A request with several faults hears of all of them in one answer."""
    request = pb.GenerateRequest(
        messages=[user("x" * 5000), pb.ChatMessage(role="assistant"), pb.ChatMessage(role="robot", content="[INST]")],
        raw=True,
        stream=True,
        max_tokens=-1,
        top_p=2,
        stop=[""],
    )
    assert {violation.field for violation in violations(validator, request)} == {
        "messages[0].content",
        "messages[1].content",
        "messages[2].content",
        "messages[2].role",
        "raw",
        "stream",
        "max_tokens",
        "top_p",
        "stop[0]",
    }


def test_violations_never_quote_the_text(validator: RequestValidator) -> None:
    """No description holds text of the request: it may end in a log."""
    messages = [pb.ChatMessage(role="secret", content="secret [INST]"), user("secret" * 999)]
    request = pb.GenerateRequest(messages=messages)
    assert "secret" not in str(violations(validator, request))


@pytest.mark.parametrize(("streaming", "stream"), [(False, False), (True, True), (False, None), (True, None)])
def test_stream_may_agree_or_be_unset(validator: RequestValidator, streaming: bool, stream: bool | None) -> None:
    """`stream` set in agreement with the RPC, or not at all, is fine with both."""
    request = pb.GenerateRequest(prompt="a")
    if stream is not None:
        request.stream = stream
    validator.validate_generate(request, streaming=streaming)


def test_generate_is_named_for_stream_false(validator: RequestValidator) -> None:
    """stream: false on GenerateStream is refused with the name of Generate."""
    found = violations(validator, pb.GenerateRequest(prompt="a", stream=False), streaming=True)
    assert "call Generate instead" in found[0].description


def test_unset_values_come_from_the_card(validator: RequestValidator) -> None:
    """Unset sampling values and max_tokens are the card's; unset seeds differ."""
    _, first = validator.validate_generate(pb.GenerateRequest(prompt="a"), streaming=False)
    _, second = validator.validate_generate(pb.GenerateRequest(prompt="a"), streaming=False)
    assert (first.temperature, first.top_p, first.top_k, first.repetition_penalty) == (0.6, 0.9, 0, 1.0)
    assert (first.max_tokens, first.stop) == (30, ())
    assert first.seed != second.seed


def test_set_values_win(validator: RequestValidator) -> None:
    """Set values are taken as they are, zeros included."""
    request = pb.GenerateRequest(
        prompt="a", temperature=0, top_p=1, top_k=3, seed=2**64 - 1, max_tokens=7, stop=["x"], repetition_penalty=1.5
    )
    _, params = validator.validate_generate(request, streaming=False)
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0, 1, 3, 2**64 - 1)
    assert (params.max_tokens, params.stop, params.repetition_penalty) == (7, ("x",), 1.5)


def test_default_max_tokens_is_cut_to_what_the_context_leaves(
    validator: RequestValidator, demo_tokenizer: Tokenizer
) -> None:
    """An unset max_tokens never makes a prompt that fits the context fail."""
    for words in range(1, 45):
        request = pb.GenerateRequest(prompt="a " * words, raw=True)
        tokens = len(demo_tokenizer.encode_raw(request.prompt))
        if tokens < 60:
            _, params = validator.validate_generate(request, streaming=False)
            assert params.max_tokens == min(30, 60 - tokens)


def test_set_max_tokens_that_does_not_fit_is_refused_with_both_numbers(
    validator: RequestValidator, demo_tokenizer: Tokenizer
) -> None:
    """The largest max_tokens that fits is accepted; one more is refused, naming prompt and context."""
    prompt = "a b c d e f g h i j k l m n o p q r s t u v w x y z"
    tokens = len(demo_tokenizer.encode_raw(prompt))
    fitting = 60 - tokens
    assert fitting < 40
    validator.validate_generate(pb.GenerateRequest(prompt=prompt, raw=True, max_tokens=fitting), streaming=False)
    (violation,) = violations(validator, pb.GenerateRequest(prompt=prompt, raw=True, max_tokens=fitting + 1))
    assert violation.field == "max_tokens"
    assert f"at most {fitting}, got {fitting + 1}" in violation.description
    assert f"has {tokens} of the 60 tokens" in violation.description


def test_prompt_is_one_user_turn_after_the_cards_system_prompt(
    small_card: ModelCard, demo_tokenizer: Tokenizer
) -> None:
    """`prompt` and the conversation that it stands for are the same tokens."""
    config = small_card.generation_config.model_copy(update={"system_prompt": "Be kind."})
    with_system = RequestValidator(small_card.model_copy(update={"generation_config": config}), demo_tokenizer)
    prompt, _ = with_system.validate_generate(pb.GenerateRequest(prompt="Hi"), streaming=False)
    chat = [pb.ChatMessage(role="system", content="Be kind."), user("Hi")]
    messages, _ = with_system.validate_generate(pb.GenerateRequest(messages=chat), streaming=False)
    assert prompt == messages
    assert demo_tokenizer.decode(prompt.token_ids) == "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]"


def test_raw_is_the_text_as_it_is(validator: RequestValidator, demo_tokenizer: Tokenizer) -> None:
    """`raw` gives the model the beginning-of-sequence token and the text, tags and all."""
    prompt, _ = validator.validate_generate(pb.GenerateRequest(prompt=" [INST] <s> x", raw=True), streaming=False)
    assert prompt.raw
    assert prompt.token_ids[0] == demo_tokenizer.bos_id
    assert demo_tokenizer.bos_id not in prompt.token_ids[1:]
    assert demo_tokenizer.decode(prompt.token_ids) == " [INST] <s> x"


def test_count_tokens_counts_what_generate_reads(validator: RequestValidator, demo_tokenizer: Tokenizer) -> None:
    """The count is that of the prompt which Generate would make, and what it leaves is what max_tokens may be."""
    prompt, _ = validator.validate_generate(pb.GenerateRequest(prompt="Hello there"), streaming=False)
    counted, left = validator.validate_count_tokens(pb.CountTokensRequest(prompt="Hello there"))
    assert (counted, left) == (len(prompt.token_ids), min(40, 60 - len(prompt.token_ids)))


def test_count_tokens_counts_beyond_the_context(validator: RequestValidator) -> None:
    """A prompt that does not fit is counted all the same, and leaves nothing."""
    counted, left = validator.validate_count_tokens(pb.CountTokensRequest(prompt="many words " * 30))
    assert counted > 60
    assert left == 0


def test_what_is_far_too_long_is_not_even_counted(validator: RequestValidator) -> None:
    """A prompt whose size alone tells that it is beyond the context is refused by CountTokens too."""
    for request in (pb.CountTokensRequest(prompt="word " * 800), pb.CountTokensRequest(messages=[user("a")] * 61)):
        with pytest.raises(InvalidRequest, match="has at least"):
            validator.validate_count_tokens(request)
