"""Generation options and the requests built from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TypedDict, TypeVar

from llama2.v1 import text_generation_pb2
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


def build_request(
    request: _PromptRequest,
    prompt: str | None,
    messages: Iterable[Message | Mapping[str, str]] | None,
    raw: bool | None,
    options: GenerationOptions,
) -> _PromptRequest:
    """Set the given fields of a request.

    Raises InvalidRequest for values that protobuf cannot encode, such as a lone surrogate or 2**64.
    """
    if unknown := options.keys() - GenerationOptions.__annotations__.keys():
        raise TypeError(f"unknown generation options: {', '.join(sorted(unknown))}")
    violations: list[Violation] = []

    @contextlib.contextmanager
    def field(path: str) -> Iterator[None]:
        try:
            yield
        except UnicodeEncodeError:
            violations.append(Violation(path, "must be Unicode text, without lone surrogates"))
        except ValueError as error:
            violations.append(Violation(path, str(error)))

    for name, value in {"prompt": prompt, "raw": raw, **options}.items():
        with field(name):
            if name == "stop":
                getattr(request, name).extend([value] if isinstance(value, str) else value or ())
            elif value is not None:
                setattr(request, name, value)
    for index, message in enumerate(messages or ()):
        with field(f"messages[{index}]"):
            fields = {"role": message.role, "content": message.content} if isinstance(message, Message) else message
            request.messages.add(**fields)
    if violations:
        raise InvalidRequest("the request cannot be encoded", violations=tuple(violations))
    return request
