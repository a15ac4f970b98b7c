"""The rules of requests that the card's JSON Schema cannot express or omits.

The comments of text_generation.proto list them with their reasons.
"""

from collections.abc import Iterator

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import SAMPLING_RANGES
from llama2_server.engine.text.tokenizer import CONTROL_TAGS
from llama2_server.errors import Violation

AnyRequest = pb.GenerateRequest | pb.CountTokensRequest

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_KEY_CHARACTERS = 128
ROLES = ("system", "user", "assistant")
_NO_TAGS = f"must not contain the chat template's control tags ({', '.join(CONTROL_TAGS)}) unless raw is true"


def input_violations(request: AnyRequest) -> Iterator[Violation]:
    """Yield the violations of the rules for prompt and messages."""
    if request.HasField("prompt") and request.messages:
        yield Violation("prompt", "only one of prompt and messages may be given")
    if request.raw and request.messages:
        yield Violation("raw", "cannot be true with messages: raw text has no roles")
    if not request.raw and _has_control_tag(request.prompt):
        yield Violation("prompt", _NO_TAGS)
    for index, message in enumerate(request.messages):
        if _has_control_tag(message.content):
            yield Violation(f"messages[{index}].content", _NO_TAGS)
        if message.HasField("role") and message.role not in ROLES:
            yield Violation(f"messages[{index}].role", "must be system, user or assistant")
    roles = [message.role for message in request.messages]
    if all(role in ROLES for role in roles):
        yield from _role_order_violations(roles)


def parameter_violations(request: pb.GenerateRequest, max_tokens_limit: int, *, streaming: bool) -> Iterator[Violation]:
    """Yield the violations of the rules for the other fields, at most a few per field."""
    if request.HasField("stream") and request.stream != streaming:
        method = "GenerateStream" if request.stream else "Generate"
        yield Violation("stream", f"is {str(request.stream).lower()}; call {method} instead, or leave it unset")
    yield from max_tokens_violations(request, max_tokens_limit)
    for name, allowed in SAMPLING_RANGES.items():
        if request.HasField(name) and getattr(request, name) not in allowed:
            yield Violation(name, f"must be {allowed}, got {getattr(request, name):g}")
    yield from _idempotency_violations(request, streaming=streaming)
    for index, stop in enumerate(request.stop[:MAX_STOPS]):
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            yield Violation(f"stop[{index}]", f"must have 1 to {MAX_STOP_CHARACTERS} characters, got {len(stop)}")


def max_tokens_violations(request: AnyRequest, limit: int) -> Iterator[Violation]:
    """Yield the violation of a `max_tokens` that no prompt allows."""
    if request.HasField("max_tokens") and not 1 <= request.max_tokens <= limit:
        yield Violation("max_tokens", f"must be in [1, {limit}], got {request.max_tokens}")


def _idempotency_violations(request: pb.GenerateRequest, *, streaming: bool) -> Iterator[Violation]:
    key = request.idempotency_key
    if request.HasField("idempotency_key") and not (1 <= len(key) <= MAX_KEY_CHARACTERS and key.isprintable()):
        yield Violation("idempotency_key", f"must have 1 to {MAX_KEY_CHARACTERS} printable characters")
    if not request.HasField("resume_after_characters"):
        return
    if request.resume_after_characters < 0:
        yield Violation("resume_after_characters", f"must be at least 0, got {request.resume_after_characters}")
    if not streaming:
        yield Violation("resume_after_characters", "is only for streams; call GenerateStream, or leave it unset")
    if not request.HasField("idempotency_key"):
        yield Violation("resume_after_characters", "needs the idempotency_key of the stream that it continues")


def _has_control_tag(text: str) -> bool:
    return any(tag in text for tag in CONTROL_TAGS)


def _role_order_violations(roles: list[str]) -> Iterator[Violation]:
    """Yield the first role that breaks the order of Llama-2's template: an optional system, then user and assistant."""
    if not roles:
        return
    start = 1 if roles[0] == "system" else 0
    for index, role in enumerate(roles[start:], start):
        expected = "user" if (index - start) % 2 == 0 else "assistant"
        if role != expected:
            yield Violation(f"messages[{index}].role", f"must be {expected} here: user and assistant alternate")
            return
    if roles[-1] != "user":
        yield Violation(f"messages[{len(roles) - 1}].role", "must be user in the last message, which the reply answers")
