"""Decide what the service must return for a JSON body: the card's schema, and the exceptions that the proto lists.

jsonschema executes the card's schema. The rest of this module states the exceptions of text_generation.proto a second
time, in the terms of the JSON body. The service checks a protobuf message, so the two share no code.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import sentencepiece
import yaml

from conformance.equivalence.fields import FIELDS, WRONG_TYPE, WRONG_VALUE, field_problem

ROLES = ("system", "user", "assistant")
TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
TAKEN_KEY = "taken"
"""The key of a request that is sent before the bodies, and that equals none of them."""
CAMEL_CASE = {"maxTokens": "max_tokens", "topP": "top_p", "topK": "top_k", "noCache": "no_cache"}

EMPTY_MESSAGES = "empty messages"
BELOW_ONE = "max_tokens below 1"
BEYOND_32_BITS = "max_tokens beyond 32 bits"
BOTH = "prompt and messages"
RAW_MESSAGES = "raw with messages"
ROLE = "role that the template does not have"
ORDER = "order of roles"
TAG = "control tag"
RAW_TYPE = "wrong type of raw next to messages"
SURROGATE = "lone surrogate"
TOKENS = "token limits"
NAME = "lowerCamelCase name"
BOTH_NAMES = "field under both names"
RESUME = "resume_after_characters without a stream"
TAKEN = "idempotency_key of another request"
NULL = "null"
QUOTED = "max_tokens in quotes"
UNSET_MESSAGES = "empty messages next to a prompt"

REJECTED = (
    EMPTY_MESSAGES, BELOW_ONE, BEYOND_32_BITS, BOTH, RAW_MESSAGES, ROLE, ORDER, TAG, WRONG_TYPE, WRONG_VALUE, RAW_TYPE,
    SURROGATE, TOKENS, NAME, BOTH_NAMES, RESUME, TAKEN,
)  # fmt: skip
"""Exceptions: rejected, although the schema accepts the body."""
ACCEPTED = (NULL, QUOTED, UNSET_MESSAGES)
"""Exceptions: accepted, although the schema rejects the body."""


@dataclass(frozen=True, slots=True)
class Judgment:
    """The decisions of the schema and of the service, and the exceptions that apply if they differ."""

    schema: bool
    accepted: bool
    exceptions: frozenset[str]


class Oracle:
    """Judges bodies by a card and by the tokenizer of the model."""

    def __init__(self, card: Path, tokenizer: Path) -> None:
        document = next(yaml.safe_load_all(card.read_text()))  # a front matter
        properties = {entry["property_id"]: entry["value"] for entry in document["model"]["properties"]}
        self._context_length_limit = int(properties["context_length_limit"])
        self._sequence_length_limit = int(properties["sequence_length_limit"])
        self._schema = jsonschema.Draft202012Validator(json.loads(document["json_schema"]["input"]))
        self._tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))

    def judge(self, body: Any) -> Judgment:
        """Judge a parsed JSON body."""
        schema = self._schema.is_valid(body)
        if not isinstance(body, dict):
            return Judgment(schema, False, frozenset())
        plain, lenient = _normalized(body)
        broken = frozenset(self._broken(plain, body))
        accepted = not broken and (self._schema.is_valid(plain) if lenient else schema)
        if accepted and self._exceeds_token_limits(plain):
            accepted, broken = False, frozenset({TOKENS})
        if schema == accepted:
            return Judgment(schema, accepted, frozenset())
        return Judgment(schema, accepted, lenient if accepted else broken)

    def _broken(self, body: dict[str, Any], original: dict[str, Any]) -> Iterator[str]:
        """Yield the exceptions that reject a normalized body."""
        messages = body.get("messages")
        if messages == []:
            yield EMPTY_MESSAGES
        both = original.get("prompt") is not None and original.get("messages") is not None
        # An empty list next to a valid prompt is unset.
        if both and (original["messages"] != [] or not self._schema.is_valid({"prompt": original["prompt"]})):
            yield BOTH
        if original.get("messages") is not None and body.get("raw") is not None:
            if not isinstance(body["raw"], bool):
                yield RAW_TYPE
            elif body["raw"] and messages is not None:
                yield RAW_MESSAGES
        if isinstance(messages, list):
            yield from _role_exceptions(messages)
        yield from _text_exceptions(body)
        yield from _field_exceptions(body)
        yield from _max_tokens_exceptions(body.get("max_tokens"))
        yield from _idempotency_exceptions(body)

    def _exceeds_token_limits(self, body: dict[str, Any]) -> bool:
        wanted, texts = body.get("max_tokens", 1), list(_texts(body))
        if wanted > self._sequence_length_limit:
            return True
        at_most = sum(len(text.encode()) for text in texts) + 64 * len(texts)
        # Tokens are counted only if the bytes do not show that they fit.
        return bool(
            wanted + min(at_most, self._context_length_limit) > self._context_length_limit
            and wanted + self.input_tokens(body) > self._context_length_limit
        )

    def input_tokens(self, body: dict[str, Any]) -> int:
        """Return the number of input tokens by Llama-2's chat template; 0 if it cannot express the body."""
        if body.get("raw"):
            return 1 + self._encoded(body.get("prompt", ""))
        turns = [(one["role"], one["content"]) for one in body.get("messages", ())] or [("user", body["prompt"])]
        if turns[0][0] == "system":
            # The template strips the system text and the first user's text as one.
            system = f"<<SYS>>\n{turns[0][1]}\n<</SYS>>\n\n"
            turns = [(role, system + text if number == 0 else text) for number, (role, text) in enumerate(turns[1:])]
        turns = [(role, text.strip()) for role, text in turns]
        if not turns or len(turns) % 2 == 0:
            return 0
        pairs = zip(turns[0::2], turns[1::2], strict=False)
        before = sum(2 + self._encoded(f"[INST] {user[1]} [/INST] {reply[1]} ") for user, reply in pairs)
        return before + 1 + self._encoded(f"[INST] {turns[-1][1]} [/INST]")

    def _encoded(self, text: str) -> int:
        return len(self._tokenizer.encode(text))


def _normalized(body: dict[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """Return a body without what protobuf's JSON form adds, and the exceptions that this needs."""
    plain, used = {}, set()
    for key, value in body.items():
        if value is None:
            used.add(NULL)
        else:
            plain[key] = value
    quoted = plain.get("max_tokens")
    if isinstance(quoted, str) and quoted.removeprefix("-").isdecimal():
        plain["max_tokens"] = int(quoted)
        used.add(QUOTED)
    if plain.get("messages") == [] and "prompt" in plain:
        del plain["messages"]
        used.add(UNSET_MESSAGES)
    return plain, frozenset(used)


def _role_exceptions(messages: list[Any]) -> Iterator[str]:
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if not all(isinstance(role, str) for role in roles):
        return
    if not set(roles) <= set(ROLES):
        yield ROLE
        return
    turns = roles[1:] if roles[:1] == ["system"] else roles
    alternating = turns == (["user", "assistant"] * len(turns))[: len(turns)]
    if roles and not (alternating and len(turns) % 2 == 1):
        yield ORDER


def _texts(body: dict[str, Any]) -> Iterator[str]:
    """Yield the texts of a body to which the model replies."""
    messages = body.get("messages")
    contents = [one.get("content") for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    yield from (text for text in [body.get("prompt"), *contents] if isinstance(text, str))


def _text_exceptions(body: dict[str, Any]) -> Iterator[str]:
    texts = list(_texts(body))
    if body.get("raw") is not True and any(tag in text for tag in TAGS for text in texts):
        yield TAG
    messages, stops = body.get("messages"), body.get("stop")
    roles = [one.get("role") for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    others = [*roles, *(stops if isinstance(stops, list) else [])]
    if not all(_is_unicode(text) for text in [*texts, *map(str, others)]):
        yield SURROGATE


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _max_tokens_exceptions(value: Any) -> Iterator[str]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value >= 2**31 or value < -(2**31):
            yield BEYOND_32_BITS
        elif value < 1:
            yield BELOW_ONE


def _idempotency_exceptions(body: dict[str, Any]) -> Iterator[str]:
    """Yield the exceptions of valid values; each key but the taken one is new, so that nothing can be resumed."""
    key, resume = body.get("idempotency_key"), body.get("resume_after_characters")
    if key == TAKEN_KEY:
        yield TAKEN
    elif resume is None or field_problem("resume_after_characters", resume) is not None:
        return
    elif int(resume) > 0 or key is None or body.get("stream") is not True:
        yield RESUME


def _field_exceptions(body: dict[str, Any]) -> Iterator[str]:
    if any(body.get(camel) is not None and body.get(name) is not None for camel, name in CAMEL_CASE.items()):
        yield BOTH_NAMES
    for key, value in body.items():
        if key in FIELDS and (problem := field_problem(key, value)):
            yield problem
        name = CAMEL_CASE.get(key)
        if (name in FIELDS and field_problem(name, value)) or (name == "max_tokens" and not _in_range(value)):
            yield NAME


def _in_range(max_tokens: Any) -> bool:
    """Return whether `maxTokens` is valid; the generated bodies have no other valid values."""
    return max_tokens in (1, 5) and not isinstance(max_tokens, bool)
