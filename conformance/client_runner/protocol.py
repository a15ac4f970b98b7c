"""The form of commands and answers: complete commands for adapters, and the one form of their answers."""

from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from llama2.v1 import text_generation_pb2

DEADLINE_MS = 20_000
CODES: dict[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}


def command_of(command: Struct) -> dict[str, Any]:
    """Return a case's command as an adapter reads it, with a deadline."""
    document: dict[str, Any] = _integers(MessageToDict(command))
    return {"deadline_ms": DEADLINE_MS, **document}


def canonical(answer: Any) -> Any:
    """Return an answer with names for numbers, digits for the seed and sorted fields; another value unchanged."""
    if not isinstance(answer, dict):
        return answer
    found = dict(answer)
    match found.get("code"):
        case int(number):
            found["code"] = CODES.get(number, "UNKNOWN")
    match found.get("finish_reason"):
        case int(number):
            names = text_generation_pb2.FinishReason.DESCRIPTOR.values_by_number
            found["finish_reason"] = names[number].name if number in names else str(number)
    if isinstance(reason := found.get("finish_reason"), str):
        found["finish_reason"] = reason.removeprefix("FINISH_REASON_")
    if isinstance(seed := found.get("seed"), int):
        found["seed"] = str(seed)
    if isinstance(fields := found.get("fields"), list):
        found["fields"] = sorted(fields, key=str)
    return found


def _integers(value: Any) -> Any:
    """Return a JSON value with whole numbers as integers: protobuf's Struct has only doubles."""
    match value:
        case float():
            return int(value) if value.is_integer() else value
        case list():
            return [_integers(entry) for entry in value]
        case dict():
            return {key: _integers(entry) for key, entry in value.items()}
        case _:
            return value
