"""Streams with idempotency keys that break off at random places, in virtual time.

Each reply has its own account, so that its records, its price and its quota are counted alone. A client resumes until
its reply is complete. Then the text must equal that of a call without a cut, and the account must have paid for one
call.
"""

import asyncio
import contextlib
import random
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import grpc
from tests.reliability.cuts.costs import (
    AFTER_DELTA,
    BEFORE_COMPLETION,
    BEFORE_TEXT,
    MAX_CUTS,
    PLACES,
    Bill,
    Outcome,
    same_completion,
    unfair_costs,
)
from tests.reliability.simulation.clients import TEXT
from tests.reliability.simulation.observer import observe
from tests.reliability.simulation.planted import Plant
from tests.reliability.simulation.replica import Replica
from tests.reliability.simulation.run import add_database, simulated_world
from tests.reliability.simulation.steps import reply_tokens
from tests.reliability.simulation.world import Shape, World
from tests.support.simulated.grpc_server import EOF

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.admission.accounts import Account, AnonymousAuthenticator, Metadata
from llama2_server.usage.pricing import TokenUsage, neurons

CLIENTS = 6
PROMPTS = 40
CALL_SECONDS = 900.0
KINDS = ("connection", "connection", "connection", "connection", "client", "SIGKILL", "SIGTERM")
"""Causes of cuts: the connection breaks, the client restarts without the text, or the server restarts."""


class AccountsByHeader(AnonymousAuthenticator):
    """Trusts the metadata `account`: each reply has an account of its own."""

    def authenticate(self, metadata: Metadata) -> Account:
        """Return the account that the metadata names."""
        return Account(str(dict(metadata)["account"]))


class CutReplies:
    """The clients of one replica."""

    def __init__(self, world: World, replica: Replica, cuts: int) -> None:
        self._world = world
        self._replica = replica
        self._left = cuts
        self._restarting = asyncio.Lock()
        self._whole_texts: dict[str, str] = {}
        self.outcome = Outcome()
        self.completions: dict[str, pb.Completion] = {}
        """By account."""
        self.prompts: dict[str, str] = {}

    async def run(self) -> None:
        """Run all clients until the cuts are made and the replies complete."""
        await asyncio.gather(*(self._client() for _ in range(CLIENTS)))
        self.outcome.replies = len(self.completions)

    async def _client(self) -> None:
        while self._left > 0:
            cuts = min(self._world.draw.randint(1, MAX_CUTS), self._left)
            self._left -= cuts
            account, prompt = f"cut{len(self.prompts)}", f"prompt {self._world.draw.randrange(PROMPTS)}"
            self.prompts[account] = prompt
            whole = await self._whole_text(prompt)
            text, completion = await self._reply(account, prompt, whole, cuts)
            if text != whole:
                self.outcome.broken.append(f"{account} has the text {text!r} instead of {whole!r}")
            self.completions[account] = completion
            if cuts < MAX_CUTS and self._world.draw.random() < 0.3:
                await self._repeat(account, prompt, whole, completion)

    async def _whole_text(self, prompt: str) -> str:
        """Return the text of a call without a cut and without a key."""
        if prompt not in self._whole_texts:
            request = pb.GenerateRequest(prompt=prompt, raw=True)
            text, completion = "", None
            while completion is None:
                text, completion = await self._attempt(f"whole {prompt}", request, "")
            self._whole_texts[prompt] = text
        return self._whole_texts[prompt]

    async def _reply(self, account: str, prompt: str, whole: str, cuts: int) -> tuple[str, pb.Completion]:
        text, draw = "", self._world.draw
        while True:
            request = pb.GenerateRequest(prompt=prompt, raw=True, idempotency_key="key")
            if text or draw.random() < 0.5:
                request.resume_after_characters = len(text)
            kind, place = (draw.choice(KINDS), draw.choice(PLACES)) if cuts else ("", "")
            goal = {BEFORE_TEXT: -1, BEFORE_COMPLETION: len(whole)}.get(place, 0)
            if place == AFTER_DELTA:
                goal = draw.randrange(len(text), len(whole)) + 1 if len(text) < len(whole) else len(whole)
            received, completion = await self._attempt(account, request, text, goal if cuts else None)
            if completion is not None:
                return received, completion
            text = received
            if cuts and (place == BEFORE_TEXT or len(text) >= goal):
                cuts -= 1
                self.outcome.cuts[kind, place] += 1
                text = await self._break(kind, text)
            await asyncio.sleep(draw.uniform(0, 1) if kind == "connection" else draw.uniform(0, 20))

    async def _attempt(
        self, account: str, request: pb.GenerateRequest, text: str, goal: int | None = None
    ) -> tuple[str, pb.Completion | None]:
        """Call once, and break the connection when the text has `goal` characters; -1 breaks it after a while."""
        call = self._replica.call(
            TEXT + "GenerateStream", request.SerializeToString(), (("account", account),), CALL_SECONDS
        )
        if goal == -1:
            asyncio.get_running_loop().call_later(self._world.draw.uniform(0, 2), call.break_off)
        completion = None
        position = request.resume_after_characters
        while (goal is None or goal < 0 or len(text) < goal) and (message := await call.read()) is not EOF:
            part = pb.GenerateStreamResponse.FromString(message)
            if part.resumed_after_characters != position:
                self.outcome.broken.append(f"{account}: {part.resumed_after_characters} instead of {position}")
            position = 0
            if goal == -1:  # the first text arrived before the break
                goal = len(text)
                break
            text += part.response
            completion = part.completion if part.HasField("completion") else None
        if call.code is grpc.StatusCode.UNAVAILABLE:  # the server ended the call, or does not run
            await asyncio.sleep(self._world.draw.uniform(0.1, 1))
        call.break_off()
        if call.code not in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE):
            raise AssertionError(f"{account}: {call.code} {call.message}")
        return text, completion

    async def _break(self, kind: str, text: str) -> str:
        """Restart what the kind of the cut says; return the text that the client still has."""
        if kind == "client":
            return ""
        if kind in ("SIGKILL", "SIGTERM") and not self._restarting.locked():
            async with self._restarting:
                if kind == "SIGKILL":
                    self._replica.kill()
                else:
                    await self._replica.stop()
                await self._replica.start()
        return text

    async def _repeat(self, account: str, prompt: str, whole: str, completion: pb.Completion) -> None:
        """The same call again has the same text and completion."""
        request = pb.GenerateRequest(prompt=prompt, raw=True, idempotency_key="key")
        again, text = None, ""
        while again is None:
            text, again = await self._attempt(account, request, "")
        if text != whole or not same_completion(again, completion):
            self.outcome.broken.append(f"{account}: the repeated call has another text or completion")


def simulate_cuts(seed: int, cuts: int, plant: Plant | None = None) -> Outcome:
    """Cut streams as often as asked, and check what the clients got and paid."""
    with simulated_world(seed, _shape(random.Random(seed))) as (world, runner, patch):
        world.authenticator = AccountsByHeader()
        observe(patch, world.history)
        if plant is not None:
            plant(patch)
        return runner.run(_simulate(world, cuts))


async def _simulate(world: World, cuts: int) -> Outcome:
    replica = Replica(world, "only")
    world.replicas = [replica]
    await replica.start()
    replies = CutReplies(world, replica, cuts)
    await replies.run()
    await replica.stop()
    with contextlib.closing(sqlite3.connect(replica.directory / "usage.db")) as connection:
        add_database(world.history, replica.name, connection)
    replies.outcome.broken += _unfair_costs(world, replies)
    replies.outcome.computations = sum(1 for _ in world.history.of("grant"))
    return replies.outcome


def _unfair_costs(world: World, replies: CutReplies) -> Iterator[str]:
    """Yield a line for each account that has not paid for exactly one call."""
    units: Counter[str] = Counter()
    for event in world.history.of("consume", "refund"):
        units[event["account"]] += 1 if event["event"] == "consume" else -1
    records: defaultdict[str, list[Bill]] = defaultdict(list)
    for event in world.history.of("record"):
        inputs, outputs = event["usage"]
        records[event["account"]].append(Bill(event["id"], inputs, outputs, Decimal(event["neurons"])))
    for account, completion in replies.completions.items():
        ids = world.tokenizer.encode_raw(replies.prompts[account])
        tokens = TokenUsage(len(ids), reply_tokens(ids))
        told, expected = Bill.told(completion), (len(ids), reply_tokens(ids), neurons(tokens, world.card.neuron_costs))
        if told.cost != expected:
            yield f"{account} was told {told.cost} instead of {expected}"
        yield from unfair_costs(account, [told], records[account], units[account])


def resume_settings(draw: random.Random) -> dict[str, Any]:
    """Return settings of a server whose streams break off and resume."""
    return {
        "max_queue_size": 64,
        "queue_timeout_seconds": 300,
        "engine_step_timeout_seconds": 30,
        "shutdown_grace_seconds": draw.choice([0, 2, 30]),
        "resume_window_seconds": draw.choice([0, 5, 30]),
    }


def _shape(draw: random.Random) -> Shape:
    settings = resume_settings(draw)
    return Shape(
        accounts=1,
        clients=CLIENTS,
        per_minute=600,
        slots=draw.choice([1, 1, 3, 8]),
        caches=draw.random() < 0.5,
        shares_quota=False,
        forwards=False,
        pause_seconds=1.0,
        settings=settings,
    )
