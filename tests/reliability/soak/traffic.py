"""Mixed traffic: every kind of call, complete, repeated, cancelled, expired and rejected."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2
from tests.support.service import health_stub

from llama2.v1 import account_pb2, account_pb2_grpc, model_pb2, model_pb2_grpc, text_generation_pb2_grpc
from llama2.v1 import text_generation_pb2 as pb

CALL_SECONDS = 60
PROMPTS = 200
"""Different prompts of calls that can be served from the response cache."""
PAUSE_SECONDS = 0.5
UNEXPECTED = ("UNKNOWN", "INTERNAL", "DATA_LOSS", "UNIMPLEMENTED")
Metadata = tuple[tuple[str, str], ...]


class Client:
    """One client, which draws its calls at random; `counts` has its calls by kind and status."""

    def __init__(self, address: str, key: str, draw: random.Random, counts: Counter[tuple[str, str]]) -> None:
        self._address, self._draw, self._counts = address, draw, counts
        self._options: dict[str, Any] = {"timeout": CALL_SECONDS, "metadata": (("authorization", f"Bearer {key}"),)}
        self._kinds: dict[Callable[[grpc.aio.Channel], Awaitable[Any]], int] = {
            self.stream: 20,
            self.unary: 15,
            self.repeated: 15,
            self.cancelled: 10,
            self.expired: 5,
            self.invalid: 5,
            self.without_key: 5,
            self.count_tokens: 15,
            self.usage: 5,
            self.model_card: 3,
            self.health: 3,
        }

    async def run(self) -> None:
        """Call the server without end, each 50 calls on a new connection."""
        while True:
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(self._address, options=options) as channel:
                for _ in range(50):
                    await self._call(channel)

    async def _call(self, channel: grpc.aio.Channel) -> None:
        [kind] = self._draw.choices(list(self._kinds), list(self._kinds.values()))
        status = "OK"
        try:
            await kind(channel)
        except grpc.aio.AioRpcError as error:
            status = error.code().name
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            status = "CANCELLED"
        self._counts[kind.__name__, status] += 1
        if status in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"):
            await asyncio.sleep(PAUSE_SECONDS)

    async def stream(self, channel: grpc.aio.Channel) -> None:
        """Read a whole reply."""
        async for _ in _text(channel).GenerateStream(self._request(), **self._options):
            pass

    async def unary(self, channel: grpc.aio.Channel) -> None:
        """Receive a reply in one message."""
        await _text(channel).Generate(self._request(), **self._options)

    async def repeated(self, channel: grpc.aio.Channel) -> None:
        """Ask for a reply that may be cached, or be generated at the moment."""
        prompt = f"Tell me story {self._draw.randrange(PROMPTS)}."
        await _text(channel).Generate(pb.GenerateRequest(prompt=prompt, max_tokens=30, temperature=0), **self._options)

    async def cancelled(self, channel: grpc.aio.Channel) -> None:
        """Disconnect at a random time: before or during the reply."""
        call = _text(channel).GenerateStream(self._request(200), **self._options)
        for _ in range(self._draw.randrange(4)):
            await call.read()
        call.cancel()

    async def expired(self, channel: grpc.aio.Channel) -> None:
        """Let the deadline pass during the reply or in the queue."""
        await _text(channel).Generate(self._request(200), **(self._options | {"timeout": 0.05}))

    async def invalid(self, channel: grpc.aio.Channel) -> None:
        """Send a request that violates the schema."""
        await _text(channel).Generate(pb.GenerateRequest(prompt="x" * 5000, top_k=-1), **self._options)

    async def without_key(self, channel: grpc.aio.Channel) -> None:
        """Send a request without a key."""
        await _text(channel).Generate(self._request(), timeout=CALL_SECONDS)

    async def count_tokens(self, channel: grpc.aio.Channel) -> None:
        """Count tokens."""
        prompt = "a story " * self._draw.randrange(1, 100)
        await _text(channel).CountTokens(pb.CountTokensRequest(prompt=prompt), **self._options)

    async def usage(self, channel: grpc.aio.Channel) -> None:
        """Read the usage of the account."""
        stub: Any = account_pb2_grpc.AccountServiceStub(channel)
        await stub.GetUsage(account_pb2.GetUsageRequest(), **self._options)

    async def model_card(self, channel: grpc.aio.Channel) -> None:
        """Read the model card."""
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        await stub.GetModelCard(model_pb2.GetModelCardRequest(), **self._options)

    async def health(self, channel: grpc.aio.Channel) -> None:
        """Watch the health, and stop."""
        watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)
        await watch.read()
        watch.cancel()

    def _request(self, max_tokens: int = 40) -> pb.GenerateRequest:
        seed = self._draw.randrange(2**32)
        return pb.GenerateRequest(prompt=f"Tell me story {seed}.", max_tokens=self._draw.randrange(1, max_tokens))


def _text(channel: grpc.aio.Channel) -> Any:
    return text_generation_pb2_grpc.TextGenerationServiceStub(channel)
