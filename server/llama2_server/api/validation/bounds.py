"""Bounds on counts and sizes, checked before a request becomes JSON: their cost does not depend on the request."""

import math

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.api.validation.rules import MAX_STOP_CHARACTERS, MAX_STOPS, AnyRequest
from llama2_server.card import ModelCard
from llama2_server.engine.text.tokenizer import ChatMessage, Tokenizer
from llama2_server.errors import Violation

_UNKNOWN = " \u2047 "  # SentencePiece's text of the unknown token, which no text has, because bytes have tokens

MESSAGE_BYTES = 24  # a role, and the tags and lengths of the fields
PARAMETER_BYTES = MAX_STOPS * (4 * MAX_STOP_CHARACTERS + 4) + 256


class Bounds:
    """The bounds that follow from a card's context and the tokenizer."""

    def __init__(self, card: ModelCard, tokenizer: Tokenizer) -> None:
        self._context_length_limit = card.context_length_limit
        self._max_piece_length = tokenizer.max_piece_length
        self._max_piece_bytes = max(len(text.encode()) for text in tokenizer.piece_texts if isinstance(text, str))
        self._min_turn_tokens = min_turn_tokens(tokenizer)

    @property
    def longest_text_bytes(self) -> int:
        """Bytes of the longest request that can fit into the context, as protobuf."""
        messages = 2 * self._context_length_limit // self._min_turn_tokens + 3
        return self._context_length_limit * self._max_piece_bytes + messages * MESSAGE_BYTES + PARAMETER_BYTES

    def count_violations(self, request: AnyRequest) -> list[Violation]:
        """Reject a request with too many entries, alone: to list the violations of each entry would cost too much."""
        stops = len(request.stop) if isinstance(request, pb.GenerateRequest) else 0
        messages, violations = len(request.messages), []
        # A system message is part of the first turn, and the last turn has no answer.
        at_least = max(messages - 1, 0) // 2 * self._min_turn_tokens
        if at_least > self._context_length_limit:
            violations.append(Violation("messages", self.too_long(f"{messages} messages with at least {at_least}")))
        if stops > MAX_STOPS:
            violations.append(Violation("stop", f"must have at most {MAX_STOPS} entries, got {stops}"))
        return violations

    def size_violations(self, request: AnyRequest) -> list[Violation]:
        """Reject a prompt whose number of characters shows that it is too long."""
        characters = sum(len(message.content) for message in request.messages) + len(request.prompt)
        at_least = math.ceil(characters / self._max_piece_length)
        if at_least <= self._context_length_limit:
            return []
        return [Violation(prompt_field(request), self.too_long(f"at least {at_least}"))]

    def too_long(self, tokens: str) -> str:
        """Return the description of a prompt that does not fit into the context."""
        limit = self._context_length_limit
        return f"has {tokens} tokens, and the context has {limit} for prompt and reply together; shorten it"


def prompt_field(request: AnyRequest) -> str:
    """Return the field that has the text of the request."""
    return "messages" if request.messages else "prompt"


def min_turn_tokens(tokenizer: Tokenizer) -> int:
    """Return the least number of tokens of a question with its answer, tags included.

    Tags and texts are separated by spaces. If a space can only begin a token, a text changes no token of the tags
    except their leading spaces: a question and an answer replace at most one token each of the empty turn.
    """
    texts = {text for text in tokenizer.piece_texts if isinstance(text, str)} - {_UNKNOWN}
    if any(" " in text.lstrip(" ") for text in texts):
        return 2  # only <s> and </s> are certain
    turns = [ChatMessage("user", ""), ChatMessage("assistant", ""), ChatMessage("user", "")]
    return max(2, len(tokenizer.encode_chat(turns)) - len(tokenizer.encode_chat(turns[:1])) - 2)
