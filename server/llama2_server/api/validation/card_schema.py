"""Run the card's JSON Schema on a body, and return its first violations in plain words.

A body that `quick_proof` finds to be valid has none. For others jsonschema executes the schema, at 15 us per message of
a conversation. Two keywords differ, so that a hostile body costs little: `oneOf` stops after a number of errors, and
`items` skips the items that `quick_proof` finds to be valid.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import jsonschema

from llama2_server.api.validation.quick_proof import quick_proof
from llama2_server.errors import Violation

MAX_VIOLATIONS = 20
"""Maximum number of violations that an error lists; validation stops after them."""

Proof = Callable[[Any], bool]
_ITEMS = jsonschema.Draft202012Validator.VALIDATORS["items"]


class CardSchema:
    """The input schema of a card."""

    def __init__(self, input_schema: str) -> None:
        schema = json.loads(input_schema)
        self._quick = quick_proof(schema)
        self._proofs: dict[int, Proof | None] = {}  # by the id of a subschema, which `schema` keeps alive
        keywords = {"oneOf": _one_of, "items": self._items}
        validators: Any = jsonschema.validators  # its published types lack this function's
        self._validator = validators.extend(jsonschema.Draft202012Validator, keywords)(schema)

    def violations(self, body: Any) -> Iterator[Violation]:
        """Yield the violations of a JSON value; more than MAX_VIOLATIONS if it has more, but not all."""
        if self._quick is not None and self._quick(body):
            return iter(())
        return _to_violations(self._validator.iter_errors(body))

    def _items(self, validator: Any, items: Any, instance: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
        """Yield the errors of the items that are not proven to be valid."""
        proof = self._proof(items) if "prefixItems" not in schema and isinstance(instance, list) else None
        if proof is None:
            yield from _ITEMS(validator, items, instance, schema)
            return
        for index, item in enumerate(instance):
            if not proof(item):
                yield from validator.descend(item, items, path=index)

    def _proof(self, schema: Any) -> Proof | None:
        if id(schema) not in self._proofs:
            self._proofs[id(schema)] = quick_proof(schema)
        return self._proofs[id(schema)]


def _one_of(validator: Any, branches: Any, instance: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    """Yield the error of `oneOf`; its context has at most MAX_VIOLATIONS + 1 errors per branch."""
    context: list[jsonschema.ValidationError] = []
    valid = 0
    for index, branch in enumerate(branches):
        errors = list(islice(validator.descend(instance, branch, schema_path=index), MAX_VIOLATIONS + 1))
        context += errors
        valid += not errors
    if valid == 0:
        yield jsonschema.ValidationError("no alternative is valid", context=context)
    elif valid > 1:
        yield jsonschema.ValidationError("several alternatives are valid")


def _to_violations(errors: Iterable[jsonschema.ValidationError]) -> Iterator[Violation]:
    for error in errors:
        if error.validator == "oneOf":
            yield from _alternatives_violations(error)
        else:
            yield _to_violation(error)


def _alternatives_violations(error: jsonschema.ValidationError) -> Iterator[Violation]:
    """Yield the violations of the alternative that the client meant: the one whose required fields are present."""
    alternatives: list[dict[str, Any]] = error.validator_value  # type: ignore[assignment]
    required = [", ".join(branch.get("required", ())) for branch in alternatives]
    branches: dict[Any, list[jsonschema.ValidationError]] = {}
    for inner in error.context or ():
        branches.setdefault(inner.schema_path[0], []).append(inner)
    intended = [inner for inner in branches.values() if not any(_misses_field(one) for one in inner)]
    if not branches:
        yield Violation(required[0], f"only one of {' and '.join(required)} may be given")
    elif not intended:
        yield Violation(required[0], f"either {' or '.join(required)} is required")
    for errors in intended:
        yield from _to_violations(errors)


def _misses_field(error: jsonschema.ValidationError) -> bool:
    return error.validator == "required" and not error.relative_path


def _to_violation(error: jsonschema.ValidationError) -> Violation:
    """Return the violation of a schema error, in plain words and without the value, which is the client's text."""
    path = _field_path(error.absolute_path)
    instance: Any = error.instance
    allowed: Any = error.validator_value
    match error.validator:
        case "required":
            missing = next(name for name in allowed if error.message.startswith(f"{name!r} "))
            return Violation(f"{path}.{missing}" if path else missing, "is required")
        case "maxLength":
            return Violation(path, f"must have at most {allowed} characters, got {len(instance)}")
        case "type":
            return Violation(path, f"must be of type {allowed}")
        case _:
            return Violation(path, f"breaks the card's schema: {error.validator} {json.dumps(allowed)}")


def _field_path(parts: Iterable[str | int]) -> str:
    """Return `messages[1].content` for ("messages", 1, "content")."""
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
