"""Violations of requests: their fields and their descriptions."""

import pytest
from tests.unit.api.requests import assistant, user

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.api.validation.request_validator import RequestValidator
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.errors import InvalidRequest, Violation


def violations(validator: RequestValidator, request: pb.GenerateRequest, streaming: bool = False) -> list[Violation]:
    with pytest.raises(InvalidRequest) as rejected:
        validator.validate_generate(request, streaming=streaming)
    return list(rejected.value.violations)


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
        # One violation in total: the messages themselves are not validated.
        (pb.GenerateRequest(messages=[pb.ChatMessage()] * 61), "messages", "has 61 messages with at least 270 tokens"),
        (pb.GenerateRequest(prompt="a", stop=["a"] * 300_000), "stop", "at most 4 entries, got 300000"),
    ],
)
def test_violation_names_field_and_rule(
    validator: RequestValidator, request_: pb.GenerateRequest, field: str, words: str
) -> None:
    """Each violation has the path of its field, and the allowed values."""
    found = violations(validator, request_)
    assert [violation.field for violation in found] == [field]
    assert words in found[0].description


def test_all_violations_are_reported_at_once(validator: RequestValidator) -> None:
    """One error has all violations of a request."""
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


def test_violations_never_contain_request_text(validator: RequestValidator) -> None:
    """Because errors may be logged, no description contains text of the request."""
    messages = [pb.ChatMessage(role="secret", content="secret [INST]"), user("secret" * 999)]
    request = pb.GenerateRequest(messages=messages)
    assert "secret" not in str(violations(validator, request))


def test_stream_false_on_generate_stream_is_rejected(validator: RequestValidator) -> None:
    """The error for `stream: false` on GenerateStream names Generate."""
    found = violations(validator, pb.GenerateRequest(prompt="a", stream=False), streaming=True)
    assert "call Generate instead" in found[0].description


def test_error_for_max_tokens_beyond_the_context_has_both_numbers(
    validator: RequestValidator, demo_tokenizer: Tokenizer
) -> None:
    """The largest max_tokens that fits is accepted; one more is rejected with the sizes of prompt and context."""
    prompt = "a b c d e f g h i j k l m n o p q r s t u v w x y z"
    tokens = len(demo_tokenizer.encode_raw(prompt))
    largest = 60 - tokens
    assert largest < 40
    validator.validate_generate(pb.GenerateRequest(prompt=prompt, raw=True, max_tokens=largest), streaming=False)
    (violation,) = violations(validator, pb.GenerateRequest(prompt=prompt, raw=True, max_tokens=largest + 1))
    assert violation.field == "max_tokens"
    assert f"at most {largest}, got {largest + 1}" in violation.description
    assert f"has {tokens} of the 60 tokens" in violation.description
