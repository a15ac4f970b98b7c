"""Checks of arguments: an argument of the wrong type raises TypeError with its name."""

from __future__ import annotations

import math
import operator
from typing import SupportsFloat, SupportsIndex


def wrong_type(name: str, expected: str, value: object) -> TypeError:
    """Return the error for a value of the wrong type; it never contains the value."""
    return TypeError(f"{name}: must be {expected}, got {type(value).__name__}")


def check_type(name: str, value: object, kind: type, expected: str) -> None:
    """Raise TypeError if the value is not an instance of `kind`."""
    if not isinstance(value, kind):
        raise wrong_type(name, expected, value)


def integer(name: str, value: object) -> int:
    """Return a whole number. Raise TypeError for anything else, including True and False."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise wrong_type(name, "an integer", value)
    return operator.index(value)


def number(name: str, value: object) -> float:
    """Return a number. Raise TypeError for anything else, including True, False and text."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat | SupportsIndex):
        raise wrong_type(name, "a number", value)
    try:
        return float(value)
    except OverflowError:
        return math.inf


def seconds(name: str, value: object) -> float:
    """Return a number of seconds. Raise TypeError for anything else and ValueError for NaN."""
    result = number(name, value)
    if math.isnan(result):
        raise ValueError(f"{name}: must be a number of seconds, got nan")
    return result
