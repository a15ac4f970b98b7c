"""The client side of a scene, and the check of the usage records against it."""

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc.aio
from tests.support.service import details

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.usage.local import statements
from llama2_server.usage.local.local_ledger import file_of
from llama2_server.usage.records import INTERRUPTED
from llama2_server.usage.schema import NEURON_DECIMALS


@dataclass(frozen=True)
class Tokens:
    """The tokens and the price of one request."""

    outcome: str
    input_tokens: int
    output_tokens: int
    neurons: Decimal

    @classmethod
    def told(cls, completion: pb.Completion) -> "Tokens":
        """Return what a completion states."""
        reason = pb.FinishReason.Name(completion.finish_reason).removeprefix("FINISH_REASON_")
        usage = completion.usage
        return cls(reason, usage.input_tokens, usage.output_tokens, Decimal(usage.neurons))


@dataclass
class History:
    """The calls of one scene, as their clients saw them."""

    completed: dict[str, Tokens] = field(default_factory=dict)
    """By request id, what the last message of a complete reply stated."""
    begun: int = 0
    """Calls that received text, but no last message."""
    failures: Counter[str] = field(default_factory=Counter)
    """Failed calls by code and reason, such as UNAVAILABLE QUOTA_STORE_UNAVAILABLE; without details, by code."""

    def complete(self, completion: pb.Completion) -> None:
        """Add the last message of a reply."""
        assert completion.request_id not in self.completed
        self.completed[completion.request_id] = Tokens.told(completion)

    def fail(self, error: grpc.aio.AioRpcError, *, begun: bool) -> None:
        """Add a failed call; a retry time is part of each rejection that a client may repeat."""
        failure = error.code().name
        if "grpc-status-details-bin" in dict(error.trailing_metadata()):
            found: Any = details(error)
            failure += f" {found['ErrorInfo'].reason}"
            if failure.startswith(("UNAVAILABLE", "RESOURCE_EXHAUSTED")) and "RetryInfo" not in found:
                failure += " without RetryInfo"
        self.failures[failure] += 1
        self.begun += begun

    def broken_promises(self, records: dict[str, Tokens]) -> Iterator[str]:
        """Compare the records with what the clients saw, and yield each difference."""
        for request_id, told in self.completed.items():
            if (record := records.get(request_id)) != told:
                yield f"request {request_id}: the client was told {told}, the record is {record}"
        others = len(records.keys() - self.completed.keys())
        if others < self.begun:
            yield f"{self.begun} calls ended after their first text, but only {others} of them have a record"


def read_records(data_directory: Path) -> dict[str, Tokens]:
    """Return the records of the local database by request id."""
    columns = "request_id, outcome, input_tokens, output_tokens, nanoneurons"
    with _connected(data_directory) as connection:
        rows = connection.execute(f"SELECT {columns} FROM usage_records").fetchall()  # noqa: S608 - constants
    return {
        request_id: Tokens(outcome, inputs, outputs, Decimal(amount).scaleb(-NEURON_DECIMALS))
        for request_id, outcome, inputs, outputs, amount in rows
    }


def broken_totals(data_directory: Path) -> Iterator[str]:
    """Yield each stored total that differs from the records, and each request that still counts as running."""
    with _connected(data_directory) as connection:
        stored, summed = statements.wrong_totals(connection)
        (running,) = connection.execute("SELECT count(*) FROM running_requests").fetchone()
    if stored or summed:
        yield f"stored totals {stored} are {summed} in the records"
    if running:
        yield f"{running} requests count as running, but no server runs"


def interrupted(records: Iterable[Tokens]) -> int:
    """Return the number of records of requests that ended with their server."""
    return sum(record.outcome == INTERRUPTED for record in records)


@contextlib.contextmanager
def _connected(data_directory: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(f"file:{file_of(data_directory)}?mode=ro", uri=True)) as connection:
        yield connection
