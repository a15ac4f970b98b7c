"""Parse the JSON body of a request to the hosted endpoint."""

import json
from collections.abc import Iterator
from typing import Any, NoReturn

from google.protobuf.json_format import ParseDict, ParseError

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.api.validation.card_schema import CardSchema
from llama2_server.api.validation.request_validator import check
from llama2_server.api.validation.rules import MAX_STOPS
from llama2_server.card import ModelCard
from llama2_server.errors import InvalidRequest, Violation

FIELDS = pb.GenerateRequest.DESCRIPTOR.fields_by_name
TYPES = {
    "CPPTYPE_STRING": "string",
    "CPPTYPE_BOOL": "boolean",
    "CPPTYPE_DOUBLE": "number",
    "CPPTYPE_INT32": "integer, in 32 bits",
    "CPPTYPE_UINT64": "integer, not negative, in 64 bits",
    "CPPTYPE_MESSAGE": "object",
}


class BodyParser:
    """Converts a JSON body into a GenerateRequest; it checks the schema and the types, RequestValidator the rest."""

    def __init__(self, card: ModelCard) -> None:
        self._schema = CardSchema(card.input_schema)
        # A message takes at least one token.
        self._max_entries = {"messages": card.context_length_limit, "stop": MAX_STOPS}

    def parse(self, data: bytes) -> pb.GenerateRequest:
        """Return the request; unknown fields are ignored, and null means unset.

        Raises:
            InvalidRequest: the body is not a JSON object, or has each violation of the schema and of the types.
        """
        fields = {name: value for name, value in _json_object(data).items() if name in FIELDS and value is not None}
        check(self._count_violations(fields))
        check(self._schema.violations(fields))
        try:
            return _request(fields)
        except (ParseError, ValueError):
            raise InvalidRequest([*_type_violations(fields)] or [Violation("", "the body is not valid")]) from None

    def _count_violations(self, fields: dict[str, Any]) -> Iterator[Violation]:
        """Yield the fields with too many entries, whose cost would grow with their number."""
        for name, limit in self._max_entries.items():
            value = fields.get(name)
            if isinstance(value, list) and len(value) > limit:
                yield Violation(name, f"must have at most {limit} entries, got {len(value)}")


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data, parse_constant=_reject_constant)
        json.dumps(body, ensure_ascii=False).encode()  # fails for a lone surrogate
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise InvalidRequest([Violation("", "the body must be one JSON object, in UTF-8")])
    return body


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _request(fields: dict[str, Any]) -> pb.GenerateRequest:
    return ParseDict(fields, pb.GenerateRequest(), ignore_unknown_fields=True)


def _type_violations(fields: dict[str, Any]) -> Iterator[Violation]:
    """Yield each field whose value protobuf rejects; its own messages quote the value."""
    for name, value in fields.items():
        try:
            _request({name: value})
        except (ParseError, ValueError):
            field = FIELDS[name]
            kind = next(kind for kind in TYPES if getattr(field, kind) == field.cpp_type)
            many = "an array of type" if field.is_repeated else "of type"
            yield Violation(name, f"must be {many} {TYPES[kind]}")
