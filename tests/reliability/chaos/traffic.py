"""Clients that call a server until the scene ends, and note what they see."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import grpc.aio
from tests.reliability.chaos.history import History

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc

CALL_SECONDS = 30
"""Deadline of a call."""
PAUSE_SECONDS = 0.02
"""Pause of a client after a rejection; it does not obey the retry time, so that it sees many states."""
Metadata = tuple[tuple[str, str], ...]


def request(draw: random.Random, max_tokens: int = 40) -> pb.GenerateRequest:
    """Return a request for a short reply."""
    seed = draw.randrange(2**32)
    return pb.GenerateRequest(
        prompt=f"Tell me story {seed}.", max_tokens=draw.randrange(1, max_tokens), seed=seed, no_cache=True
    )


async def call(
    channel: grpc.aio.Channel,
    draw: random.Random,
    history: History,
    on_complete: Callable[[], None] = lambda: None,
    metadata: Metadata = (),
) -> bool:
    """Call the server once, add to the history what the client sees, and return whether the reply is complete."""
    stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
    message, begun = request(draw), False
    try:
        if draw.random() < 0.3:
            history.complete((await stub.Generate(message, timeout=CALL_SECONDS, metadata=metadata)).completion)
        else:
            async for part in stub.GenerateStream(message, timeout=CALL_SECONDS, metadata=metadata):
                begun = True
                if part.HasField("completion"):
                    history.complete(part.completion)
    except grpc.aio.AioRpcError as error:
        history.fail(error, begun=begun)
        return False
    on_complete()
    return True


class Traffic:
    """Clients of one server."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.history = History()
        self.latencies: list[float] = []
        """Seconds of each complete reply."""
        self._changed = asyncio.Event()

    async def completed(self, replies: int) -> None:
        """Wait until this many more replies are complete."""
        goal = len(self.history.completed) + replies
        await self._until(lambda: len(self.history.completed) >= goal)

    async def failed(self, failure: str, times: int = 1) -> None:
        """Wait until this many more calls fail with this code and reason."""
        goal = self.history.failures[failure] + times
        await self._until(lambda: self.history.failures[failure] >= goal)

    async def client(self, draw: random.Random, metadata: Metadata) -> None:
        """Call the server without end."""
        while True:
            started_at = time.monotonic()
            complete = await call(self.channel, draw, self.history, metadata=metadata)
            self._changed.set()
            if complete:
                self.latencies.append(time.monotonic() - started_at)
            else:
                await asyncio.sleep(PAUSE_SECONDS)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()


@asynccontextmanager
async def traffic(
    address: str, draw: random.Random, *, clients: int = 4, metadata: Sequence[tuple[str, str]] = ()
) -> AsyncIterator[Traffic]:
    """Run clients of a server during the body; then cancel their calls."""
    async with grpc.aio.insecure_channel(address) as channel:
        running = Traffic(channel)
        seeds = [draw.randrange(2**32) for _ in range(clients)]
        tasks = [asyncio.create_task(running.client(random.Random(seed), tuple(metadata))) for seed in seeds]
        try:
            yield running
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for error in ended:
            if not isinstance(error, asyncio.CancelledError):
                raise AssertionError("a client failed") from error
