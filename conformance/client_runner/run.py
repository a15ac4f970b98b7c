"""Run the cases against a client: a program that reads commands and writes answers, one JSON object per line."""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

from google.protobuf.json_format import MessageToDict

from conformance.client_runner.protocol import canonical, command_of
from conformance.client_runner.scripted_server import ScriptedServer, running_scripted_server
from conformance.server_runner.check import MISSING, matches
from conformance.server_runner.run import CaseResult, outcome_of
from conformance.server_runner.suite import StoredCase
from conformance.v1 import conformance_pb2 as pb

ANSWER_TIMEOUT_SECONDS = 30
CANCEL_TIMEOUT_SECONDS = 5
LINE_BYTES = 16 * 1024 * 1024


class Client(Protocol):
    """Answers commands."""

    async def ask(self, command: dict[str, Any]) -> Any:
        """Make one call and return the answer."""


class Adapter:
    """A running adapter."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, command: dict[str, Any]) -> Any:
        """Send one command and return the answer.

        Raises:
            EOFError: the program ended.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise EOFError("the adapter has no pipes")
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            raise EOFError("the adapter has ended")
        return json.loads(line)


ClientMaker: TypeAlias = Callable[[str], AbstractAsyncContextManager[Client]]
"""Opens a client of the server at an address."""


@asynccontextmanager
async def running_adapter(command: Sequence[str], address: str) -> AsyncIterator[Adapter]:
    """Run the adapter with the server's address as its last argument."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, address, stdin=pipe, stdout=pipe, limit=LINE_BYTES)
    try:
        yield Adapter(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def run_client_cases(
    open_client: ClientMaker, cases: Sequence[pb.ClientCase], known_failures: Mapping[str, str] = MappingProxyType({})
) -> list[CaseResult]:
    """Run the cases one after the other; the client is opened again if it ends or does not answer."""
    results: list[CaseResult] = []
    async with running_scripted_server() as (server, address):
        waiting = list(cases)
        while waiting:
            async with open_client(address) as client:
                ended = False
                while waiting and not ended:
                    case, started = waiting.pop(0), time.monotonic()
                    differences, ended = await _run(server, client, case)
                    stored = StoredCase(f"client/{case.name}", "core", case.rule, {})
                    outcome = outcome_of(bool(differences), case.name in known_failures)
                    results.append(CaseResult(stored, outcome, tuple(differences), time.monotonic() - started))
    return results


async def _run(server: ScriptedServer, client: Client, case: pb.ClientCase) -> tuple[list[str], bool]:
    """Return the differences, and whether the adapter must start again."""
    server.play(list(case.scripts))
    differences: list[str] = []
    try:
        for number, call in enumerate(case.calls, 1):
            async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
                answer = canonical(await client.ask(command_of(call.command)))
            differences += [f"call {number}: {text}" for text in await _check(server, call, answer)]
    except TimeoutError:
        return [*differences, f"no answer within {ANSWER_TIMEOUT_SECONDS} seconds"], True
    except Exception as error:  # an adapter can answer anything, and the other cases must run
        return [*differences, f"{type(error).__name__}: {error}"], True
    if case.attempts and len(server.calls) != case.attempts:
        differences.append(f"attempts: want {case.attempts}, got {len(server.calls)}")
    return differences, False


async def _check(server: ScriptedServer, call: pb.ClientCall, answer: Any) -> list[str]:
    received = server.calls[-1] if server.calls else None
    request = MessageToDict(received.request, preserving_proto_field_name=True) if received else {}
    differences = [*_compare("answer", call.answer, answer), *_compare("received", call.received, request)]
    for name, pattern in call.metadata.items():
        value = received.headers.get(name, "") if received else ""
        if not re.fullmatch(pattern, value):
            differences.append(f"metadata {name}: {value!r} does not match {pattern}")
    if call.cancelled and received is not None:
        try:
            async with asyncio.timeout(CANCEL_TIMEOUT_SECONDS):
                await received.cancelled.wait()
        except TimeoutError:
            differences.append("cancelled: the server was not told")
    return differences


def _compare(kind: str, wanted: Any, document: Any) -> list[str]:
    found = []
    for path, value in wanted.items():
        expected = MessageToDict(value)
        equal, got = matches(document, path, expected)
        if not equal:
            found.append(f"{kind} {path}: want {expected!r}, got {'nothing' if got is MISSING else repr(got)}")
    return found
