"""Convert a request message into a Prompt and GenerationParams, or raise InvalidRequest with its violations.

The card's own JSON Schema runs on the JSON form of the message: the schema is executed, not implemented a second time.
The order keeps a rejected request cheap: bounds on counts, then schema and rules up to MAX_VIOLATIONS, then the tokens.
"""

import secrets
from collections.abc import Iterable
from itertools import chain, islice
from typing import NamedTuple

from google.protobuf.json_format import MessageToDict

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.api.validation.bounds import Bounds, prompt_field
from llama2_server.api.validation.card_schema import MAX_VIOLATIONS, CardSchema
from llama2_server.api.validation.rules import (
    AnyRequest,
    input_violations,
    max_tokens_violations,
    parameter_violations,
)
from llama2_server.card import SAMPLING_RANGES, ModelCard
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.text.tokenizer import ChatMessage, Tokenizer
from llama2_server.errors import InvalidRequest, Violation
from llama2_server.generation.prompt import Prompt

CHEAP_MESSAGES = 50
CHEAP_CHARACTERS = 8192


class RequestTokens(NamedTuple):
    """The tokens of a request without a reply."""

    input_tokens: int
    max_output_tokens: int
    """The largest `max_tokens` that fits; 0 if the prompt does not fit."""
    priced_output_tokens: int
    """The output tokens of the most expensive reply to this request; 0 if the prompt does not fit."""


class RequestValidator:
    """Validates requests against a card, and counts their tokens with a tokenizer."""

    def __init__(self, card: ModelCard, tokenizer: Tokenizer) -> None:
        self._card = card
        self._tokenizer = tokenizer
        self._schema = CardSchema(card.input_schema)
        self._bounds = Bounds(card, tokenizer)

    def validate_generate(self, request: pb.GenerateRequest, *, streaming: bool) -> tuple[Prompt, GenerationParams]:
        """Return the prompt and the parameters of a Generate request, or of a GenerateStream request if `streaming`.

        Raises:
            InvalidRequest: has the violations of the schema and the rules, MAX_VIOLATIONS at most. The token limits are
                checked after these, and only if none is violated.
        """
        parameters = parameter_violations(request, self._card.sequence_length_limit, streaming=streaming)
        self._check_input(request, parameters)
        prompt = self._encode(request, max_tokens=self._card.context_length_limit)
        if violations := self._token_violations(request, len(prompt.token_ids)):
            raise InvalidRequest(violations)
        return prompt, self._params(request, len(prompt.token_ids))

    def validate_count_tokens(self, request: pb.CountTokensRequest) -> RequestTokens:
        """Count the input tokens and the possible output tokens of a request.

        Raises:
            InvalidRequest: as `validate_generate`. A prompt that exceeds the context is counted, unless its size alone
                shows that it cannot fit.
        """
        self._check_input(request, max_tokens_violations(request, self._card.sequence_length_limit))
        input_tokens = len(self._encode(request).token_ids)
        room = self._card.context_length_limit - input_tokens
        if room < 1:
            return RequestTokens(input_tokens, 0, 0)
        if violations := self._token_violations(request, input_tokens):
            raise InvalidRequest(violations)
        largest = min(room, self._card.sequence_length_limit)
        return RequestTokens(input_tokens, largest, self._max_tokens(request, room))

    def is_costly(self, request: AnyRequest) -> bool:
        """Return whether validation takes so long that it belongs in another thread."""
        if self._bounds.count_violations(request):
            return False
        if len(request.messages) > CHEAP_MESSAGES:
            return True
        return sum(len(message.content) for message in request.messages) + len(request.prompt) > CHEAP_CHARACTERS

    def _check_input(self, request: AnyRequest, parameters: Iterable[Violation] = ()) -> None:
        if violations := self._bounds.count_violations(request):
            raise InvalidRequest(violations)
        body = MessageToDict(request, preserving_proto_field_name=True)
        check(chain(self._schema.violations(body), input_violations(request), parameters))
        if violations := self._bounds.size_violations(request):
            raise InvalidRequest(violations)

    def _encode(self, request: AnyRequest, max_tokens: int | None = None) -> Prompt:
        """Return the prompt; of a conversation with more than `max_tokens`, only the turns up to that number."""
        if request.raw:
            return Prompt(tuple(self._tokenizer.encode_raw(request.prompt)), raw=True)
        ids = self._tokenizer.encode_chat(self._conversation(request), max_tokens=max_tokens)
        return Prompt(tuple(ids), raw=False)

    def _conversation(self, request: AnyRequest) -> list[ChatMessage]:
        if request.messages:
            return [ChatMessage(message.role, message.content) for message in request.messages]
        system_prompt = self._card.generation_config.system_prompt
        system = [ChatMessage("system", system_prompt)] if system_prompt is not None else []
        return [*system, ChatMessage("user", request.prompt)]

    def _token_violations(self, request: AnyRequest, input_tokens: int) -> list[Violation]:
        limit = self._card.context_length_limit
        room = limit - input_tokens
        if room < 1:
            tokens = f"at least {input_tokens}" if request.messages else str(input_tokens)
            return [Violation(prompt_field(request), self._bounds.too_long(tokens))]
        if request.HasField("max_tokens") and request.max_tokens > room:
            reason = f"the prompt has {input_tokens} of the {limit} tokens of the context"
            return [Violation("max_tokens", f"must be at most {room}, got {request.max_tokens}: {reason}")]
        return []

    def _max_tokens(self, request: AnyRequest, room: int) -> int:
        """Return the request's `max_tokens`, or the card's default as far as it fits."""
        if request.HasField("max_tokens"):
            return request.max_tokens
        return min(self._card.default_max_tokens, self._card.sequence_length_limit, room)

    def _params(self, request: pb.GenerateRequest, input_tokens: int) -> GenerationParams:
        room = self._card.context_length_limit - input_tokens
        sources = {
            name: request if request.HasField(name) else self._card.generation_config for name in SAMPLING_RANGES
        }
        return GenerationParams(
            max_tokens=self._max_tokens(request, room),
            seed=request.seed if request.HasField("seed") else secrets.randbits(64),
            stop=tuple(request.stop),
            **{name: getattr(source, name) for name, source in sources.items()},
        )


def check(violations: Iterable[Violation]) -> None:
    """Raise InvalidRequest with the first MAX_VIOLATIONS different violations, if there are any."""
    found: dict[Violation, None] = {}
    for violation in violations:
        found[violation] = None
        if len(found) > MAX_VIOLATIONS:
            break
    if found:
        listed = list(islice(found, MAX_VIOLATIONS))
        raise InvalidRequest(listed, complete=len(listed) == len(found))
