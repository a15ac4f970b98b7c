"""The JSON that Envoy's transcoder reads: examples/envoy/README.md lists what it accepts in addition."""

from typing import Any

BOOLEANS = {"raw", "no_cache", "noCache"}
TEXTS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def as_envoy_reads(body: Any) -> Any:
    """Return a body in the form that only protobuf's JSON has: Envoy reads both in the same way."""
    if not isinstance(body, dict):
        return body
    read = {key: _value(key, value) for key, value in body.items()}
    # The filter that routes streams finds no `stream` next to such a number, and Generate rejects it.
    return read | {"stream": "not found"} if body.get("stream") is True and _has_large_number(body) else read


def _has_large_number(value: Any) -> bool:
    """Return whether a JSON value has a whole number that does not fit in 64 bits with a sign."""
    if isinstance(value, dict | list):
        return any(map(_has_large_number, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def _value(key: str, value: Any) -> Any:
    if key in BOOLEANS and isinstance(value, str):
        return TEXTS.get(value, value)
    if key == "stop" and isinstance(value, str):
        return [value]
    if key in {"messages", "stop"} and isinstance(value, list):
        return list(_flattened(value))
    return value


def _flattened(values: list[Any]) -> list[Any]:
    """Return the elements of a list and of the lists in it, without null."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, list):
            found += _flattened(value)
        elif value is not None:
            found.append(value)
    return found
