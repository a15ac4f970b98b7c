"""Clients over real sockets whose streams break off, and which resume until their replies are complete."""

import asyncio
import random
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import grpc.aio
from tests.reliability.cuts.costs import (
    AFTER_DELTA,
    BEFORE_COMPLETION,
    BEFORE_TEXT,
    MAX_CUTS,
    Bill,
    Outcome,
    payable_recomputations,
    same_completion,
)
from tests.reliability.cuts.servers import POLL_SECONDS, CutServer
from tests.support.servers.cutting_proxy import CuttingProxy

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_server.idempotency.request import key_digest

CALL_SECONDS = 60
PAUSE_SECONDS = 0.1
"""Longest pause before a client calls again."""
HEROES = ("fox", "bear", "girl", "boy", "rabbit", "cat", "dog", "bird")
HOMES = ("sea", "river", "forest", "lake", "hill", "road")
# Without the minimum, which is also the time limit of a handshake: a busy machine would never connect.
RECONNECT = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]
CONNECTION, CLIENT, SIGKILL, SIGTERM, REPLICA = "connection", "client", "SIGKILL", "SIGTERM", "replica"
"""Causes of cuts: the network, a restart of the client without its text, a restart of the server, and a change to the
other replica."""

Cut = tuple[str, str]
"""Kind and place."""
Attempt = tuple[str, pb.Completion | None, Cut | None]
"""The text so far; the completion of a whole reply; and the cut that was made, otherwise."""


class CutClient:
    """One client with its own account; its replies follow each other.

    Args:
        account: its name.
        api_keys: the API keys of its account, and of the account `whole`, whose calls have no idempotency key.
        model: the name of the model.
        draw: decides the requests and the places.
        servers: the replicas.
        cuts: the cuts that it makes.
        outcome: the results of all clients.
    """

    def __init__(
        self,
        account: str,
        api_keys: dict[str, str],
        model: str,
        draw: random.Random,
        servers: Sequence[CutServer],
        cuts: Sequence[Cut],
        outcome: Outcome,
    ) -> None:
        self.account = account
        self._metadata = {name: (("authorization", f"Bearer {key}"),) for name, key in api_keys.items()}
        self._model = model
        self._draw = draw
        self._servers = servers
        self._server = draw.choice(servers)
        self._cuts = list(cuts)
        self._outcome = outcome
        self.bills: list[Bill] = []
        """What the completions of its replies state."""
        self.payable: list[str] = []
        """The ids of the recomputations that are not free, if they took place."""
        self._attempts = 0

    async def run(self) -> None:
        """Make all cuts, and complete all replies."""
        async with CuttingProxy.running(lambda: self._server.address) as self._proxy:
            self._connect()
            try:
                while self._cuts:
                    count = min(self._draw.randint(1, MAX_CUTS), len(self._cuts))
                    mine, self._cuts = self._cuts[:count], self._cuts[count:]
                    await self._one_reply(mine, repeats=count < MAX_CUTS and self._draw.random() < 0.3)
            finally:
                await self._channel.close()

    async def _one_reply(self, cuts: list[Cut], *, repeats: bool) -> None:
        request = self._request()
        self._attempts = 0
        text, completion = await self._reply(request, cuts)
        self._outcome.replies += 1
        self.bills.append(Bill.told(completion))
        whole = pb.GenerateRequest(prompt=request.prompt, max_tokens=request.max_tokens, seed=completion.seed)
        uncut, other = await self._reply(whole, [])
        name = f"{self.account}, key {request.idempotency_key}"
        if text != uncut:
            self._outcome.broken.append(f"{name}: the text is {text!r} instead of {uncut!r}")
        if Bill.told(completion).cost != Bill.told(other).cost:
            self._outcome.broken.append(f"{name}: the reply costs {Bill.told(completion)}, without a cut {other.usage}")
        if repeats:
            again, third = await self._reply(request, [])
            if again != uncut or not same_completion(third, completion):
                self._outcome.broken.append(f"{name}: the repeated call has another text or completion")
        self.payable += payable_recomputations(completion.request_id, self._attempts)

    def _request(self) -> pb.GenerateRequest:
        draw = self._draw
        request = pb.GenerateRequest(
            prompt=f"Tell me a story about a {draw.choice(HEROES)} who lives by the {draw.choice(HOMES)}.",
            max_tokens=draw.randrange(4, 40),
            idempotency_key=f"{draw.getrandbits(64):x}",
        )
        if draw.random() < 0.5:  # otherwise the server draws it
            request.seed = draw.randrange(2**53)
        return request

    async def _reply(self, request: pb.GenerateRequest, cuts: list[Cut]) -> tuple[str, pb.Completion]:
        text, left = "", list(cuts)
        while True:
            await self._server.wait_until_up()
            attempt = pb.GenerateRequest()
            attempt.CopyFrom(request)
            if text or (request.idempotency_key and self._draw.random() < 0.5):
                attempt.resume_after_characters = len(text)
            text, completion, cut = await self._attempt(attempt, text, left[0] if left else None)
            if completion is not None:
                return text, completion
            if cut is not None:
                self._outcome.cuts[cut] += 1
                left.pop(0)
                text = await self._break(cut[0], text)
            elif not request.idempotency_key:
                text = ""
            await asyncio.sleep(self._draw.uniform(0, PAUSE_SECONDS))

    async def _attempt(self, request: pb.GenerateRequest, text: str, cut: Cut | None) -> Attempt:
        """Call once, and return when the text has come to the cut; `_break` then breaks the connection."""
        account = self.account if request.idempotency_key else "whole"
        self._attempts += bool(request.idempotency_key)
        call: Any = self._stub.GenerateStream(request, timeout=CALL_SECONDS, metadata=self._metadata[account])
        kind, place = cut or ("", "")
        digest = key_digest(self._model, account, request.idempotency_key)
        deltas = self._draw.randrange(request.max_tokens // 2) if place == AFTER_DELTA else None
        first = True
        try:
            with self._server.opening(digest) if request.idempotency_key else nullcontext():
                if place == BEFORE_TEXT:
                    return await self._cut_before_text(call, digest, text, kind)
                part = await call.read()
            while isinstance(part, pb.GenerateStreamResponse):
                if first:
                    self._check_position(request, part)
                    first = False
                if part.HasField("completion"):
                    # If the cut is later than the text, the completion is lost.
                    return (text, None, (kind, BEFORE_COMPLETION)) if cut else (text, part.completion, None)
                text += part.response
                if deltas == 0:
                    return text, None, cut
                deltas = None if deltas is None else deltas - 1
                part = await call.read()
        except grpc.aio.AioRpcError as error:
            self._check_error(error)
        return text, None, None

    async def _cut_before_text(self, call: Any, digest: str, text: str, kind: str) -> Attempt:
        """Wait until the call has a usage record if the server will be killed; otherwise for a random time."""
        reading = asyncio.ensure_future(call.read())
        try:
            if kind == SIGKILL:
                while not reading.done() and not self._server.is_open(digest):
                    await asyncio.sleep(POLL_SECONDS)
            else:
                await asyncio.wait([reading], timeout=self._draw.uniform(0, PAUSE_SECONDS))
            if reading.done() and not isinstance(reading.result(), pb.GenerateStreamResponse):
                return text, None, None
            return text, None, (kind, BEFORE_TEXT)
        finally:
            reading.cancel()
            await asyncio.wait([reading])

    async def _break(self, kind: str, text: str) -> str:
        """Break the connection as the kind says; return the text that the client still has."""
        if kind in (SIGKILL, SIGTERM):
            code = await self._server.restart(kills=kind == SIGKILL)
            if code not in (None, -9 if kind == SIGKILL else 0):
                self._outcome.broken.append(f"the server exited with {code} after {kind}")
        if kind == REPLICA:
            self._server = next(one for one in self._servers if one is not self._server)
        self._proxy.cut()
        if kind == CLIENT:
            await self._channel.close()
            self._connect()
            return ""
        return text

    def _connect(self) -> None:
        self._channel = grpc.aio.insecure_channel(self._proxy.address, options=RECONNECT)
        self._stub = text_generation_pb2_grpc.TextGenerationServiceStub(self._channel)

    def _check_position(self, request: pb.GenerateRequest, part: pb.GenerateStreamResponse) -> None:
        asked, told = request.resume_after_characters, part.resumed_after_characters
        if told != asked:
            self._outcome.broken.append(f"{self.account} resumed after {told} characters instead of {asked}")

    def _check_error(self, error: grpc.aio.AioRpcError) -> None:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise AssertionError(f"{self.account} got {error.code()}: {error.details()}") from error
