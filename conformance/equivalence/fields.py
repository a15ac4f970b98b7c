"""Values of the fields that the card does not define, by the comments of text_generation.proto."""

import math
from collections.abc import Callable
from typing import Any

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_KEY_CHARACTERS = 128
WRONG_TYPE = "wrong type of a field outside the card"
WRONG_VALUE = "value out of range of a field outside the card"


class WrongTypeError(Exception):
    """A value has a type that protobuf's JSON form does not allow for the field."""


def _number(value: Any) -> float:
    """Return a number, which may be quoted."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise WrongTypeError
    try:
        return float(value)
    except ValueError:
        raise WrongTypeError from None


def _whole(value: Any) -> int:
    """Return a whole number, which may be quoted or written as 5.0."""
    if isinstance(value, str) and value.removeprefix("-").isdecimal():
        return int(value)
    if isinstance(value, bool | str) or not isinstance(value, int | float) or value != math.floor(value):
        raise WrongTypeError
    return int(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise WrongTypeError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise WrongTypeError
    return value


def _stops(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(stop, str) for stop in value):
        raise WrongTypeError
    return value


def _stops_in_range(stops: list[str]) -> bool:
    return len(stops) <= MAX_STOPS and all(1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops)


FIELDS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], bool]]] = {
    "temperature": (_number, lambda value: 0 <= value <= 5),
    "top_p": (_number, lambda value: 0 < value <= 1),
    "top_k": (_whole, lambda value: 0 <= value < 2**31),
    "seed": (_whole, lambda value: 0 <= value < 2**64),
    "repetition_penalty": (_number, lambda value: 0 < value <= 2),
    "frequency_penalty": (_number, lambda value: -2 <= value <= 2),
    "presence_penalty": (_number, lambda value: -2 <= value <= 2),
    "stop": (_stops, _stops_in_range),
    "no_cache": (_boolean, lambda value: True),
    "idempotency_key": (_text, lambda value: 1 <= len(value) <= MAX_KEY_CHARACTERS and value.isprintable()),
    "resume_after_characters": (_whole, lambda value: 0 <= value < 2**31),
}
"""Reader and range of each field."""


def field_problem(name: str, value: Any) -> str | None:
    """Return which exception a value is; None if the service accepts it."""
    read, in_range = FIELDS[name]
    try:
        return None if in_range(read(value)) else WRONG_VALUE
    except WrongTypeError:
        return WRONG_TYPE
