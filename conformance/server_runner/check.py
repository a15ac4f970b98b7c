"""Compare the result of a call with the required one."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict

from conformance.server_runner.invariants import broken
from conformance.server_runner.outcome import Outcome
from conformance.v1 import conformance_pb2 as pb
from llama2.v1 import text_generation_pb2

MISSING = object()
PART = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def check(expect: pb.Expect, outcome: Outcome, earlier: Sequence[Outcome]) -> list[str]:
    """Return each difference in words; none if the result is as required. `earlier` has the results of all steps."""
    wanted = expect.code or "OK"
    if outcome.code != wanted:
        message = f": {outcome.message}" if outcome.message else ""
        return [f"code: want {wanted}, got {outcome.code}{message}"]
    return [
        *_differences(_plain(expect, outcome)),
        *_differences(_stream(expect, outcome)),
        *_error(expect, outcome),
        *_http(expect, outcome),
        *_values(expect, outcome),
        *_same(expect, outcome, earlier),
        *(f"{pb.Invariant.Name(rule)}: {why}" for rule in expect.invariants for why in broken(rule, outcome, earlier)),
    ]


def _differences(pairs: Iterator[tuple[str, Any, Any]]) -> Iterator[str]:
    for name, wanted, got in pairs:
        if wanted != got:
            yield f"{name}: want {wanted!r}, got {got!r}"


def _plain(expect: pb.Expect, outcome: Outcome) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, required value and returned value of the fields of a reply."""
    completion, usage = outcome.completion, outcome.completion.usage
    if expect.HasField("text"):
        yield "text", expect.text, outcome.text
    if expect.text_pattern:
        yield (
            "text_pattern",
            True,
            re.fullmatch(expect.text_pattern, outcome.text, re.DOTALL) is not None or outcome.text,
        )
    if expect.finish_reason:
        name = text_generation_pb2.FinishReason.Name(completion.finish_reason)
        yield "finish_reason", expect.finish_reason, name.removeprefix("FINISH_REASON_")
    if expect.HasField("input_tokens"):
        yield "input_tokens", expect.input_tokens, usage.input_tokens
    if expect.HasField("output_tokens"):
        yield "output_tokens", expect.output_tokens, usage.output_tokens
    if expect.neurons:
        yield "neurons", expect.neurons, usage.neurons
    if expect.seed:
        yield "seed", expect.seed, str(completion.seed)
    if expect.HasField("cached"):
        yield "cached", expect.cached, completion.cached


def _stream(expect: pb.Expect, outcome: Outcome) -> Iterator[tuple[str, Any, Any]]:
    if len(outcome.messages) < expect.min_messages:
        yield "messages", f"at least {expect.min_messages}", len(outcome.messages)
    if expect.first_message_within_ms and outcome.first_message_ms > expect.first_message_within_ms:
        yield "first_message_ms", f"at most {expect.first_message_within_ms}", round(outcome.first_message_ms)


def _error(expect: pb.Expect, outcome: Outcome) -> Iterator[str]:
    if expect.reason and expect.reason != outcome.detail("ErrorInfo").reason:
        yield f"reason: want {expect.reason}, got {outcome.detail('ErrorInfo').reason or 'none'}"
    if expect.fields:
        got = sorted(violation.field for violation in outcome.detail("BadRequest").field_violations)
        yield from _differences(iter([("fields", list(expect.fields), got)]))
    if expect.details:
        yield from _differences(
            iter([("details", list(expect.details), sorted(name for name, _ in outcome.details()))])
        )
    if expect.HasField("retry_delay_ms"):
        delay = outcome.detail("RetryInfo").retry_delay.ToMilliseconds()
        if not expect.retry_delay_ms.min <= delay <= expect.retry_delay_ms.max:
            yield f"retry_delay_ms: want {expect.retry_delay_ms.min} to {expect.retry_delay_ms.max}, got {delay}"
    if expect.message_pattern and not re.search(expect.message_pattern, outcome.message):
        yield f"message: {outcome.message!r} does not match {expect.message_pattern}"
    for secret in expect.secrets:
        if secret in outcome.message or secret in str(outcome.status):
            yield f"secrets: the error has {secret!r}"


def _http(expect: pb.Expect, outcome: Outcome) -> Iterator[str]:
    if expect.http_status and expect.http_status != outcome.http_status:
        yield f"http_status: want {expect.http_status}, got {outcome.http_status}"
    for name, pattern in expect.headers.items():
        if not re.fullmatch(pattern, outcome.headers.get(name, "")):
            yield f"header {name}: {outcome.headers.get(name)!r} does not match {pattern}"


def _values(expect: pb.Expect, outcome: Outcome) -> Iterator[str]:
    document = outcome.last if expect.values else {}
    for path, value in expect.values.items():
        wanted = MessageToDict(value)
        equal, got = matches(document, path, wanted)
        if not equal:
            yield f"{path}: want {wanted!r}, got {'nothing' if got is MISSING else repr(got)}"


def matches(document: Any, path: str, wanted: Any) -> tuple[bool, Any]:
    """Return whether the value at a path is the wanted one or matches its regular expression, and the value."""
    got = look_up(document, path)
    if wanted is None:
        equal = got is MISSING
    elif isinstance(wanted, str) and wanted.startswith("~"):
        equal = isinstance(got, str) and re.fullmatch(wanted[1:], got, re.DOTALL) is not None
    else:
        equal = wanted == got and isinstance(wanted, bool) == isinstance(got, bool)
    return equal, got


def look_up(document: Any, path: str) -> Any:
    """Return the value at a path such as `days[0].neurons`, or the number of its elements if the path ends with `#`."""
    for name, index in PART.findall(path.removesuffix("#")):
        try:
            document = document[int(index)] if index else document[name]
        except (KeyError, IndexError, TypeError):
            return MISSING
    return len(document) if path.endswith("#") else document


def _same(expect: pb.Expect, outcome: Outcome, earlier: Sequence[Outcome]) -> Iterator[str]:
    for rule in expect.same:
        first = _comparable(earlier[rule.step - 1], rule.earlier_value or rule.value)
        second = _comparable(outcome, rule.value)
        if (first == second) == rule.differs:
            wanted = "another value than" if rule.differs else "the value of"
            yield f"{rule.value}: want {wanted} step {rule.step}, which is {first!r}; got {second!r}"


def _comparable(outcome: Outcome, value: str) -> Any:
    if value == "text":
        return outcome.text
    return getattr(outcome.completion, value) if value in {"seed", "request_id"} else look_up(outcome.last, value)
