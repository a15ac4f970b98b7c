"""Generation options and the requests built from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, datetime
from typing import TypedDict, TypeVar

from llama2.v1 import account_pb2, text_generation_pb2
from llama2_client.arguments import check_type, integer, number, wrong_type
from llama2_client.errors import InvalidRequest, Violation
from llama2_client.reply import Message

_PromptRequest = TypeVar("_PromptRequest", text_generation_pb2.GenerateRequest, text_generation_pb2.CountTokensRequest)


class GenerationOptions(TypedDict, total=False):
    """How to generate. An option that is missing or None is not sent, so that the card's default applies."""

    max_tokens: int | None  # maximum number of tokens to generate
    temperature: float | None  # 0 is greedy
    top_p: float | None  # 1 considers all tokens
    top_k: int | None  # 0 considers all tokens
    seed: int | None  # any unsigned 64-bit value; equal requests with equal seeds get equal replies
    repetition_penalty: float | None  # 1 is off
    frequency_penalty: float | None  # 0 is off
    presence_penalty: float | None  # 0 is off
    stop: str | Iterable[str] | None  # one text that ends the reply, or several
    no_cache: bool | None  # True: neither read nor write the response cache
    timeout: float | None  # deadline in seconds, queue time and retries included; None: the client's default


_MAX_INT32, _MAX_UINT64 = 2**31 - 1, 2**64 - 1
# The range that the field's type can encode; the server checks the card's limits.
_INTEGERS = {"max_tokens": (-_MAX_INT32, _MAX_INT32), "top_k": (-_MAX_INT32, _MAX_INT32), "seed": (0, _MAX_UINT64)}
_BOOLEANS = {"raw", "no_cache"}


def build_request(
    request: _PromptRequest,
    prompt: str | None,
    messages: Iterable[Message | Mapping[str, str]] | None,
    raw: bool | None,
    options: GenerationOptions,
) -> _PromptRequest:
    """Set the given fields of a request.

    Raises:
        TypeError: an option is unknown, or a value has the wrong type; the error names the parameter.
        InvalidRequest: protobuf cannot encode a value, such as a lone surrogate or 2**64.
    """
    if unknown := options.keys() - GenerationOptions.__annotations__.keys():
        raise TypeError(f"unknown generation options: {', '.join(sorted(unknown))}")
    violations: list[Violation] = []
    for name, value in {"prompt": prompt, "raw": raw, **options}.items():
        if name == "stop":
            for text in _stop_texts(value):
                with _collect(violations, name):
                    getattr(request, name).append(text)
        elif value is not None:
            with _collect(violations, name):
                setattr(request, name, _field_value(name, value))
    for path, name, value in _message_fields(request, messages):
        with _collect(violations, path):
            setattr(request.messages[-1], name, value)
    if violations:
        raise InvalidRequest("the request cannot be encoded", violations=tuple(violations))
    return request


@contextlib.contextmanager
def _collect(violations: list[Violation], path: str) -> Iterator[None]:
    """Add a violation of the field at this path if protobuf cannot encode the field's value."""
    try:
        yield
    except UnicodeEncodeError:
        violations.append(Violation(path, "must be Unicode text, without lone surrogates"))
    except ValueError as error:
        violations.append(Violation(path, str(error)))


def usage_request(since: date | None, until: date | None) -> account_pb2.GetUsageRequest:
    """Return the request for the usage of these days. Raise TypeError for a value that is not a date."""
    request = account_pb2.GetUsageRequest()
    for name, day in {"since": since, "until": until}.items():
        if day is None:
            continue
        if isinstance(day, datetime):  # a subclass of `date`, whose day depends on a time zone
            raise wrong_type(name, "a date", day)
        check_type(name, day, date, "a date")
        setattr(request, name, day.isoformat())
    return request


def _field_value(name: str, value: object) -> object:
    """Return the value of a field. Raise TypeError if it has the wrong type and ValueError if it is out of range."""
    if name in _INTEGERS:
        (minimum, maximum), whole = _INTEGERS[name], integer(name, value)
        if not minimum <= whole <= maximum:
            raise ValueError(f"must be from {minimum} to {maximum}, got {whole}")
        return whole
    if name in _BOOLEANS:
        check_type(name, value, bool, "True or False")
        return value
    if name == "prompt":
        check_type(name, value, str, "a string")
        return value
    return number(name, value)


def _stop_texts(value: object) -> Iterator[str]:
    """Yield each stop sequence."""
    if value is None:
        return
    if isinstance(value, str):
        yield value
        return
    if not isinstance(value, Iterable):
        raise wrong_type("stop", "a string or several strings", value)
    for index, text in enumerate(value):
        check_type(f"stop[{index}]", text, str, "a string")
        yield text


def _message_fields(
    request: text_generation_pb2.GenerateRequest | text_generation_pb2.CountTokensRequest, messages: object
) -> Iterator[tuple[str, str, str]]:
    """Add the messages to the request, and yield the path, the name and the value of each of their fields."""
    if messages is None:
        return
    if isinstance(messages, str | bytes | Mapping | Message) or not isinstance(messages, Iterable):
        raise wrong_type("messages", "a list of messages", messages)
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        fields = {"role": message.role, "content": message.content} if isinstance(message, Message) else message
        check_type(path, fields, Mapping, "a Message or a mapping with role and content")
        request.messages.add()
        for name, value in fields.items():
            if name not in ("role", "content"):
                raise TypeError(f"{path}: has the unknown key {name!r}; a message has role and content")
            if value is not None:
                check_type(f"{path}.{name}", value, str, "a string")
                yield f"{path}.{name}", name, value
