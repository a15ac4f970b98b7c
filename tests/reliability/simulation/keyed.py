"""Calls with idempotency keys to two replicas that share a usage store, in virtual time: as many records as keys.

Replies get lost, statements of the store get lost, and replicas are killed. A client repeats each call, on any replica,
until it has the reply. Then each key has one usage record, and all its completions are equal.
"""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal

import grpc
from tests.reliability.cuts.costs import MAX_CUTS, Bill, same_completion
from tests.reliability.simulation.clients import CALL_SECONDS, TEXT
from tests.reliability.simulation.cuts import AccountsByHeader, resume_settings
from tests.reliability.simulation.faults import Faults
from tests.reliability.simulation.observer import observe
from tests.reliability.simulation.planted import Plant
from tests.reliability.simulation.replica import Replica
from tests.reliability.simulation.run import settle, simulated_world
from tests.reliability.simulation.world import Shape, World
from tests.support.simulated.grpc_server import EOF

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.idempotency.key_accounting import FREE_RECOMPUTATIONS

CALLS_PER_SEED = 2000
CLIENTS = 16
ACCOUNTS = 5
PROMPTS = 400
MAX_PAUSE_SECONDS = 10.0
"""Longest pause after a call that a server rejected or that a kill ended."""
FAULTS = frozenset(
    {
        "SIGKILL",
        "SIGKILL at completion",
        "SIGKILL after a commit",
        "SIGTERM",
        "the usage store",
        "replies of the usage store",
    }
)


@dataclass
class KeyedOutcome:
    """The result of one simulation."""

    calls: int = 0
    keys: int = 0
    records: int = 0
    """Usage records of calls, without the billed recomputations."""
    billed: int = 0
    """Recomputations after the free ones; each has a record, linked to that of its call."""
    lost_replies: int = 0
    """Calls whose clients lost the whole reply or the rest of it."""
    kills: int = 0
    results: Counter[str] = field(default_factory=Counter)
    """Status codes of the calls that did not lose their replies."""
    broken: list[str] = field(default_factory=list)
    """Broken promises."""

    def add(self, other: "KeyedOutcome") -> None:
        """Add the result of another simulation."""
        self.calls += other.calls
        self.keys += other.keys
        self.records += other.records
        self.billed += other.billed
        self.lost_replies += other.lost_replies
        self.kills += other.kills
        self.results += other.results
        self.broken += other.broken


class KeyedCalls:
    """The clients of all replicas."""

    def __init__(self, world: World, calls: int) -> None:
        self._world = world
        self._calls = calls
        self._numbers = itertools.count(1)
        self._texts: dict[str, str] = {}
        """The whole text by prompt."""
        self.completions: dict[str, pb.Completion] = {}
        """The first completion by key."""
        self.calls_by_key: Counter[str] = Counter()
        self.outcome = KeyedOutcome()

    async def run(self) -> None:
        """Call until all calls are made, and each key has its reply."""
        await asyncio.gather(*(self._client() for _ in range(CLIENTS)))
        self.outcome.keys = len(self.completions)

    async def _client(self) -> None:
        draw = self._world.draw
        while self.outcome.calls < self._calls:
            key = f"key {next(self._numbers)}"
            prompt = f"prompt {draw.randrange(PROMPTS)}"
            losses = draw.choice([0, 1, 1, 2, MAX_CUTS])
            account, text, complete = f"a{draw.randrange(ACCOUNTS)}", "", False
            while not complete or losses:
                request = pb.GenerateRequest(prompt=prompt, raw=True, idempotency_key=key)
                streams = draw.random() < 0.7
                if streams and draw.random() < 0.7:
                    request.resume_after_characters = len(text)
                begin = text if request.resume_after_characters else ""
                loses = losses > 0 and draw.random() < 0.5
                text, complete = await self._call(account, request, begin, streams=streams, breaks=loses)
                if loses or (complete and losses):  # a whole reply can also be lost on the client's side
                    self.outcome.lost_replies += 1
                    losses -= 1
                await asyncio.sleep(draw.uniform(0, 2 if loses or complete else MAX_PAUSE_SECONDS))

    async def _call(
        self, account: str, request: pb.GenerateRequest, text: str, *, streams: bool, breaks: bool
    ) -> tuple[str, bool]:
        """Call once; return the text so far, and whether it is complete."""
        self.outcome.calls += 1
        self.calls_by_key[request.idempotency_key] += 1
        draw, method = self._world.draw, "GenerateStream" if streams else "Generate"
        replica = draw.choice(self._world.replicas)
        call = replica.call(TEXT + method, request.SerializeToString(), (("account", account),), CALL_SECONDS)
        if breaks:
            asyncio.get_running_loop().call_later(draw.uniform(0, 4), call.break_off)
        kind = pb.GenerateStreamResponse if streams else pb.GenerateResponse
        while (message := await call.read()) is not EOF:
            part = kind.FromString(message)
            text += part.response
            if part.HasField("completion"):
                self._complete(request, text, part.completion)
                return text, True
        if not breaks:
            code = "none" if call.code is None else call.code.name
            self.outcome.results[code] += 1
            if call.code is not grpc.StatusCode.UNAVAILABLE:
                self.outcome.broken.append(f"{request.idempotency_key}: {code} {call.message}")
        return text if streams else "", False

    def _complete(self, request: pb.GenerateRequest, text: str, completion: pb.Completion) -> None:
        self.outcome.results["OK"] += 1
        key = request.idempotency_key
        if (whole := self._texts.setdefault(request.prompt, text)) != text:
            self.outcome.broken.append(f"{key} has the text {text!r} instead of {whole!r}")
        if not same_completion(self.completions.setdefault(key, completion), completion):
            self.outcome.broken.append(f"{key} has two completions")


def simulate_keys(seed: int, calls: int, plant: Plant | None = None) -> KeyedOutcome:
    """Call with keys as often as asked, and compare the records with the keys."""
    with simulated_world(seed, _shape(random.Random(seed))) as (world, runner, patch):
        world.authenticator = AccountsByHeader()
        faults = Faults(world, patch, FAULTS)
        observe(patch, world.history)
        if plant is not None:
            plant(patch)
        return runner.run(_simulate(world, faults, calls))


async def _simulate(world: World, faults: Faults, calls: int) -> KeyedOutcome:
    replicas = world.replicas = [Replica(world, name) for name in ("left", "right")]
    for replica in replicas:
        await replica.start()
    injecting = asyncio.create_task(faults.run(replicas))
    clients = KeyedCalls(world, calls)
    try:
        await clients.run()
    finally:
        injecting.cancel()
        await asyncio.wait([injecting])
    await settle(world, faults)
    outcome = clients.outcome
    outcome.kills = sum(1 for _ in world.history.of("kill"))
    outcome.broken += _wrong_records(world, clients)
    return outcome


def _wrong_records(world: World, clients: KeyedCalls) -> Iterator[str]:
    """Yield a line for each key without its record, and for each record without a key."""
    outcome, records = clients.outcome, _records(world)
    for key, completion in clients.completions.items():
        told, found = Bill.told(completion), records.pop(completion.request_id, set())
        outcome.records += bool(found)
        if found != {told}:
            yield f"{key} has the records {found} instead of {told}"
        # Each earlier call of the key computed the reply at most once.
        for number in range(FREE_RECOMPUTATIONS + 1, clients.calls_by_key[key]):
            linked = records.pop(f"{completion.request_id}-{number}", None)
            outcome.billed += linked is not None
    outcome.records += len(records)
    for request_id in records:
        yield f"the record {request_id} has no key"
    for event in world.history.of("database"):
        if event["wrong_totals"] or event["running"]:
            yield f"database {event['database']}: {event['wrong_totals']} wrong totals, {event['running']} run"


def _records(world: World) -> dict[str, set[Bill]]:
    """Return the records of all databases by request id; equal ones are one."""
    records: dict[str, set[Bill]] = {}
    for event in world.history.of("record"):
        inputs, outputs = event["usage"]
        bill = Bill(event["id"], inputs, outputs, Decimal(event["neurons"]))
        records.setdefault(event["id"], set()).add(bill)
    return records


def _shape(draw: random.Random) -> Shape:
    # With the other fallback, a key that both replicas use during an outage names two calls.
    settings = resume_settings(draw) | {"idempotency_fallback": "reject"}
    return Shape(
        accounts=ACCOUNTS,
        clients=CLIENTS,
        per_minute=1_000_000,
        slots=draw.choice([1, 3, 8]),
        caches=draw.random() < 0.5,
        shares_quota=False,
        forwards=True,
        pause_seconds=1.0,
        settings=settings,
    )
