"""Send generated bodies to the service, over gRPC and through the JSON gateway, and compare with the oracle."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from google.protobuf.json_format import Parse, ParseError

from conformance.equivalence.bodies import make_body
from conformance.equivalence.gateway import as_envoy_reads
from conformance.equivalence.oracle import ACCEPTED, REJECTED, TAKEN_KEY, Oracle
from conformance.server_runner.target import Target
from llama2.v1 import text_generation_pb2 as pb

SERVICE = "/llama2.v1.TextGenerationService"
CALLS_AT_ONCE = 6
MAX_PROBLEMS = 20
DEADLINE_SECONDS = 60
ATTEMPTS = 20
RETRY_SECONDS = 1.0
REJECTIONS = {"INVALID_ARGUMENT", "FAILED_PRECONDITION"}
TRANSIENT = {"CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}
TRANSIENT_HTTP = {429, 503, 504}


@dataclass(slots=True)
class Tally:
    """Counts of bodies and differences; `problems` are the differences that no exception explains."""

    bodies: Counter[tuple[str, bool]] = field(default_factory=Counter)
    """Number of bodies by route and by the decision of the service."""
    differences: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of differences by route and exception; only bodies with exactly one exception count."""
    lenient: int = 0
    """Number of bodies that Envoy reads differently, which no exception counts."""
    problems: list[str] = field(default_factory=list)

    def compare(self, route: str, body: Any, decision: bool | str, oracle: Oracle) -> str | None:
        """Count a body; return a difference that no exception explains."""
        read = as_envoy_reads(body) if route == "JSON" else body
        judgment = oracle.judge(read)
        if decision != judgment.accepted:
            why = ", ".join(sorted(judgment.exceptions)) or f"the schema returns {judgment.schema}"
            return f"want {judgment.accepted} ({why}), got {decision}"
        self.bodies[route, judgment.accepted] += 1
        if read != body:
            self.lenient += 1
        elif len(judgment.exceptions) == 1:
            self.differences[route, next(iter(judgment.exceptions))] += 1
        return None

    def missing(self, route: str, least: int) -> list[str]:
        """Return a problem for each exception that fewer than `least` bodies of a route met."""
        counts = {name: self.differences[route, name] for name in (*REJECTED, *ACCEPTED)}
        return [f"{route}: {name} met {count} times, want {least}" for name, count in counts.items() if count < least]

    def table(self) -> str:
        """Return the numbers for people."""
        lines = [f"{'exception':<45} {'schema':>8} {'gRPC':>8} {'JSON':>8}"]
        for name in (*REJECTED, *ACCEPTED):
            decision = "accepts" if name in REJECTED else "rejects"
            counts = [self.differences[route, name] for route in ("gRPC", "JSON")]
            lines.append(f"{name:<45} {decision:>8} {counts[0]:>8} {counts[1]:>8}")
        for accepted, text in ((True, "bodies that the service accepts"), (False, "bodies that the service rejects")):
            lines.append(f"{text:<54} {self.bodies['gRPC', accepted]:>8} {self.bodies['JSON', accepted]:>8}")
        lines.append(f"{'bodies that Envoy reads more leniently':<63} {self.lenient:>8}")
        return "\n".join(lines)


async def run_equivalence(
    target: Target, oracle: Oracle, *, bodies: int, seed: int, json_share: int, on_count: Callable[[int], None]
) -> Tally:
    """Send bodies, several at once, until all are sent or too many differences have no explanation.

    Args:
        target: the server, and the JSON gateway in front of it.
        oracle: what the service must decide.
        bodies: the number of bodies.
        seed: selects the bodies; body `number` of a seed is always the same.
        json_share: one of this number of bodies goes through the JSON gateway, too.
        on_count: is called with the number of each body that was sent.
    """
    tally, numbers = Tally(), iter(range(bodies))
    calls = _Calls(target)
    await calls.take_key()

    async def work(numbers: Iterator[int]) -> None:
        for number in numbers:
            if len(tally.problems) >= MAX_PROBLEMS:
                return
            body = make_body(seed, number)
            routes = ["gRPC", "JSON"] if number % json_share == 0 and target.http is not None else ["gRPC"]
            for route in routes:
                decision = await calls.decide(route, body)
                if problem := tally.compare(route, body, decision, oracle):
                    text = json.dumps(body)
                    tally.problems.append(f"{route}: body {number} of seed {seed}: {problem}: {text[:200]}")
            on_count(number)

    await asyncio.gather(*(work(numbers) for _ in range(CALLS_AT_ONCE)))
    return tally


class _OverloadedError(Exception):
    """The server or the gateway has no time for the call."""


class _Calls:
    """Makes the calls; each returns whether the body is accepted, or the status if it is neither."""

    def __init__(self, target: Target) -> None:
        key = target.keys.key("main")
        self._metadata = [] if key is None else [("authorization", f"Bearer {key}")]
        self._http = target.http
        self._methods: dict[bool, Any] = {
            stream: target.channel.unary_stream(f"{SERVICE}/{'GenerateStream' if stream else 'Generate'}")
            for stream in (False, True)
        }

    async def take_key(self) -> None:
        """Send the request that has the taken key.

        Raises:
            RuntimeError: the server rejects it.
        """
        decision = await self.decide("gRPC", {"prompt": "taken", "max_tokens": 1, "idempotency_key": TAKEN_KEY})
        if decision is not True:
            raise RuntimeError(f"equivalence: the server must accept a request with an idempotency key, got {decision}")

    async def decide(self, route: str, body: Any) -> bool | str:
        """Return the decision; a server without time repeats its answer later."""
        for _ in range(ATTEMPTS):
            try:
                return await (self._grpc(body) if route == "gRPC" else self._json(body))
            except _OverloadedError as error:
                last = str(error)
                await asyncio.sleep(RETRY_SECONDS)
        return last

    async def _grpc(self, body: Any) -> bool | str:
        """Parse the body as protobuf's JSON, and call the method that `stream` selects."""
        try:
            request = Parse(json.dumps(body), pb.GenerateRequest(), ignore_unknown_fields=True)
        except ParseError:
            return False
        method = self._methods[request.stream]
        try:
            async for _ in method(request.SerializeToString(), metadata=self._metadata, timeout=DEADLINE_SECONDS):
                pass
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            if code in TRANSIENT:
                raise _OverloadedError(f"{code}: {error.details()}") from error
            return False if code in REJECTIONS else f"{code}: {error.details()}"
        return True

    async def _json(self, body: Any) -> bool | str:
        """Post the body to the gateway."""
        if self._http is None:
            return "no gateway"
        headers = {"content-type": "application/json", **dict(self._metadata)}
        reply = await self._http.post("/v1/generate", content=json.dumps(body), headers=headers)
        if reply.status_code in TRANSIENT_HTTP:
            raise _OverloadedError(f"{reply.status_code}: {reply.text[:200]}")
        if reply.status_code not in {200, 400}:
            return f"{reply.status_code}: {reply.text[:200]}"
        return reply.status_code == 200
