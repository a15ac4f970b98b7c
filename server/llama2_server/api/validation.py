"""Convert a request message into a Prompt and GenerationParams, or raise InvalidRequest with every violation.

The card's JSON Schema runs on the JSON form of the message: the schema is executed, not implemented a second time.
`_extra_rules` has the rules that a schema cannot express; the comments of text_generation.proto list them with their
reasons.
"""

import json
import math
import secrets
from collections.abc import Iterable, Iterator
from typing import Any

import jsonschema
from google.protobuf.json_format import MessageToDict

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import SAMPLING_RANGES, ModelCard
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.text.tokenizer import CONTROL_TAGS, ChatMessage, Tokenizer
from llama2_server.errors import InvalidRequest, Violation
from llama2_server.generation.prompt import Prompt

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
ROLES = ("system", "user", "assistant")

AnyRequest = pb.GenerateRequest | pb.CountTokensRequest


class RequestValidator:
    """Validates requests against a card, and counts their tokens with a tokenizer."""

    def __init__(self, card: ModelCard, tokenizer: Tokenizer) -> None:
        self._card = card
        self._tokenizer = tokenizer
        self._schema = jsonschema.Draft202012Validator(json.loads(card.input_schema))

    def validate_generate(self, request: pb.GenerateRequest, *, streaming: bool) -> tuple[Prompt, GenerationParams]:
        """Return the prompt and the parameters of a Generate request, or of a GenerateStream request if `streaming`.

        Raises:
            InvalidRequest: has every violation of the schema and the rules. The token limits are checked
                after these, and only if none is violated.
        """
        violations = [*self._input_violations(request), *self._parameter_violations(request, streaming)]
        violations = violations or self._size_violations(request)
        if not violations:
            prompt = self._encode(request)
            params = self._params(request, len(prompt.token_ids))
            violations = self._token_violations(request, len(prompt.token_ids))
        if violations:
            raise InvalidRequest(violations)
        return prompt, params

    def validate_count_tokens(self, request: pb.CountTokensRequest) -> tuple[int, int]:
        """Return the number of input tokens, and the largest `max_tokens` that fits; 0 if the prompt does not fit.

        Raises:
            InvalidRequest: as `validate_generate`. A prompt that exceeds the context is counted, unless its size alone
                shows that it cannot fit.
        """
        if violations := self._input_violations(request) or self._size_violations(request):
            raise InvalidRequest(violations)
        input_tokens = len(self._encode(request).token_ids)
        room = self._card.context_length_limit - input_tokens
        return input_tokens, max(0, min(room, self._card.sequence_length_limit))

    def _input_violations(self, request: AnyRequest) -> list[Violation]:
        if len(request.messages) > self._card.context_length_limit:
            # Each message takes at least one token. Validating hundreds of thousands of messages, and listing their
            # violations, would block the event loop for half a minute.
            return [Violation("messages", self._too_long(f"at least {len(request.messages)}"))]
        body = MessageToDict(request, preserving_proto_field_name=True)
        found = [*schema_violations(self._schema.iter_errors(body)), *_extra_rules(request)]
        return list(dict.fromkeys(found))  # without duplicates, in order

    def _parameter_violations(self, request: pb.GenerateRequest, streaming: bool) -> Iterator[Violation]:
        if request.HasField("stream") and request.stream != streaming:
            method = "GenerateStream" if request.stream else "Generate"
            yield Violation("stream", f"is {str(request.stream).lower()}; call {method} instead, or leave it unset")
        limit = self._card.sequence_length_limit
        if request.HasField("max_tokens") and not 1 <= request.max_tokens <= limit:
            yield Violation("max_tokens", f"must be in [1, {limit}], got {request.max_tokens}")
        for name, allowed in SAMPLING_RANGES.items():
            if request.HasField(name) and getattr(request, name) not in allowed:
                yield Violation(name, f"must be {allowed}, got {getattr(request, name):g}")
        if len(request.stop) > MAX_STOPS:
            yield Violation("stop", f"must have at most {MAX_STOPS} entries, got {len(request.stop)}")
        for index, stop in enumerate(request.stop[:MAX_STOPS]):
            if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
                yield Violation(f"stop[{index}]", f"must have 1 to {MAX_STOP_CHARACTERS} characters, got {len(stop)}")

    def _size_violations(self, request: AnyRequest) -> list[Violation]:
        """Reject a prompt whose size alone shows that it is too long. Encoding it would block the event loop."""
        characters = sum(len(message.content) for message in request.messages) + len(request.prompt)
        at_least = math.ceil(characters / self._tokenizer.max_piece_length)
        if at_least <= self._card.context_length_limit:
            return []
        return [Violation(_prompt_field(request), self._too_long(f"at least {at_least}"))]

    def _encode(self, request: AnyRequest) -> Prompt:
        if request.raw:
            return Prompt(tuple(self._tokenizer.encode_raw(request.prompt)), raw=True)
        return Prompt(tuple(self._tokenizer.encode_chat(self._conversation(request))), raw=False)

    def _conversation(self, request: AnyRequest) -> list[ChatMessage]:
        if request.messages:
            return [ChatMessage(message.role, message.content) for message in request.messages]
        system_prompt = self._card.generation_config.system_prompt
        system = [ChatMessage("system", system_prompt)] if system_prompt is not None else []
        return [*system, ChatMessage("user", request.prompt)]

    def _token_violations(self, request: pb.GenerateRequest, input_tokens: int) -> list[Violation]:
        limit = self._card.context_length_limit
        room = limit - input_tokens
        if room < 1:
            return [Violation(_prompt_field(request), self._too_long(str(input_tokens)))]
        if request.HasField("max_tokens") and request.max_tokens > room:
            reason = f"the prompt has {input_tokens} of the {limit} tokens of the context"
            return [Violation("max_tokens", f"must be at most {room}, got {request.max_tokens}: {reason}")]
        return []

    def _too_long(self, tokens: str) -> str:
        limit = self._card.context_length_limit
        return f"has {tokens} tokens, and the context has {limit} for prompt and reply together; shorten it"

    def _params(self, request: pb.GenerateRequest, input_tokens: int) -> GenerationParams:
        room = self._card.context_length_limit - input_tokens
        default_max_tokens = min(self._card.default_max_tokens, self._card.sequence_length_limit, room)
        sources = {
            name: request if request.HasField(name) else self._card.generation_config for name in SAMPLING_RANGES
        }
        return GenerationParams(
            max_tokens=request.max_tokens if request.HasField("max_tokens") else default_max_tokens,
            seed=request.seed if request.HasField("seed") else secrets.randbits(64),
            stop=tuple(request.stop),
            **{name: getattr(source, name) for name, source in sources.items()},
        )


def _prompt_field(request: AnyRequest) -> str:
    return "messages" if request.messages else "prompt"


def schema_violations(errors: Iterable[jsonschema.ValidationError]) -> Iterator[Violation]:
    """Yield the violations of schema errors, in plain words."""
    for error in errors:
        if error.validator == "oneOf":
            yield from _alternatives_violations(error)
        else:
            yield _to_violation(error)


def _alternatives_violations(error: jsonschema.ValidationError) -> Iterator[Violation]:
    """Yield the violations of the alternative that the client meant: the one whose required fields are present."""
    alternatives: list[dict[str, Any]] = error.validator_value  # type: ignore[assignment]
    required = [", ".join(branch.get("required", ())) for branch in alternatives]
    branches: dict[Any, list[jsonschema.ValidationError]] = {}
    for inner in error.context or ():
        branches.setdefault(inner.schema_path[0], []).append(inner)
    intended = [inner for inner in branches.values() if not any(_misses_field(one) for one in inner)]
    if not branches:
        yield Violation(required[0], f"only one of {' and '.join(required)} may be given")
    elif not intended:
        yield Violation(required[0], f"either {' or '.join(required)} is required")
    for errors in intended:
        yield from schema_violations(errors)


def _misses_field(error: jsonschema.ValidationError) -> bool:
    return error.validator == "required" and not error.relative_path


def _to_violation(error: jsonschema.ValidationError) -> Violation:
    """Return the violation of a schema error, in plain words and without the value, which is the client's text."""
    path = _field_path(error.absolute_path)
    instance: Any = error.instance
    allowed: Any = error.validator_value
    match error.validator:
        case "required":
            missing = next(name for name in allowed if error.message.startswith(f"{name!r} "))
            return Violation(f"{path}.{missing}" if path else missing, "is required")
        case "maxLength":
            return Violation(path, f"must have at most {allowed} characters, got {len(instance)}")
        case "type":
            return Violation(path, f"must be of type {allowed}")
        case _:
            return Violation(path, f"breaks the card's schema: {error.validator} {json.dumps(allowed)}")


def _field_path(parts: Iterable[str | int]) -> str:
    """Return `messages[1].content` for ("messages", 1, "content")."""
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _extra_rules(request: AnyRequest) -> Iterator[Violation]:
    """Yield the violations of rules that a JSON Schema cannot express or that the card's schema omits."""
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
    if all(message.role in ROLES for message in request.messages):
        yield from _role_order_violations([message.role for message in request.messages])


_NO_TAGS = f"must not contain the chat template's control tags ({', '.join(CONTROL_TAGS)}) unless raw is true"


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
