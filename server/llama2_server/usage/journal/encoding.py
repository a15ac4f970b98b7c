"""Encoding of journal entries, one per line: a checksum, a space, a JSON list, a newline."""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from llama2_server.usage.pricing import TokenUsage, decimal_text
from llama2_server.usage.records import RunningRequest, UsageRecord


@dataclass(frozen=True, slots=True)
class Progress:
    """Tokens computed so far for a running request."""

    request_id: str
    tokens: TokenUsage


Entry = RunningRequest | Progress | UsageRecord

_dumps = json.JSONEncoder(separators=(",", ":")).encode


def encode(entry: Entry) -> bytes:
    """Encode an entry as a line."""
    body = _dumps(_fields(entry)).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(body), body)


def decode(line: bytes) -> Entry:
    """Decode the entry of a line.

    Raises:
        ValueError: it is incomplete or damaged.
    """
    checksum, _, body = line.removesuffix(b"\n").partition(b" ")
    if checksum != b"%08x" % zlib.crc32(body):
        raise ValueError("the checksum does not match")
    try:
        kind, *fields = json.loads(body)
        entry: Entry = _READERS[kind](*fields)
    except (KeyError, TypeError, InvalidOperation) as error:
        raise ValueError("this version does not know the entry") from error
    return entry


def decode_all(data: bytes) -> Iterator[Entry | None]:
    """Yield the entries of a file's content, and None for each incomplete or damaged line."""
    for line in data.splitlines(keepends=True):
        try:
            yield decode(line) if line.endswith(b"\n") else None
        except ValueError:
            yield None


def _fields(entry: Entry) -> list[object]:
    if isinstance(entry, Progress):
        return ["progress", entry.request_id, entry.tokens.input_tokens, entry.tokens.output_tokens]
    common = [entry.request_id, entry.account_id, entry.model, entry.started_at.isoformat()]
    if isinstance(entry, RunningRequest):
        costs = {metric: str(cost) for metric, cost in entry.neuron_costs.items()}
        return ["running", *common, costs, entry.tokens.input_tokens, entry.tokens.output_tokens]
    tokens = [entry.input_tokens, entry.output_tokens, entry.cached, decimal_text(entry.neurons)]
    return ["ended", *common, entry.finished_at.isoformat(), *tokens, entry.outcome]


def _running(
    request_id: str, account_id: str, model: str, started_at: str, costs: dict[str, str], inputs: int, outputs: int
) -> RunningRequest:
    neuron_costs = {metric: Decimal(cost) for metric, cost in costs.items()}
    tokens = TokenUsage(inputs, outputs)
    return RunningRequest(request_id, account_id, model, datetime.fromisoformat(started_at), neuron_costs, tokens)


def _progress(request_id: str, inputs: int, outputs: int) -> Progress:
    return Progress(request_id, TokenUsage(inputs, outputs))


def _finished(
    request_id: str, account_id: str, model: str, started_at: str, finished_at: str, *rest: Any
) -> UsageRecord:
    inputs, outputs, cached, neurons, outcome = rest
    times = datetime.fromisoformat(started_at), datetime.fromisoformat(finished_at)
    return UsageRecord(request_id, account_id, model, *times, inputs, outputs, cached, Decimal(neurons), outcome)


_READERS: dict[str, Any] = {"running": _running, "progress": _progress, "ended": _finished}
