"""SIGKILL at the moment when a client receives the last message of a reply."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import grpc.aio
from tests.reliability.chaos.history import History
from tests.support.forks import ForkedServer, Forks
from tests.support.processes import card_file

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc

SLOTS = 4
CALLS = 6
"""Concurrent calls of each server."""
SLOW_COMMIT_SECONDS = 0.05
UNLIMITED = {"default": 1_000_000, "accounts": {}}


def fast_card(folder: Path) -> Path:
    """Return a card for many short replies: several slots, no response cache, and no limit of requests."""
    return card_file(folder, max_concurrent_requests=SLOTS, infer_response_cache=None, max_requests_per_min=UNLIMITED)


async def call(address: str, seed: int, history: History, on_complete: Callable[[], None]) -> None:
    """Call the server once, and add to the history what the client sees."""
    draw = random.Random(seed)
    request = pb.GenerateRequest(prompt=f"Tell me story {seed}.", max_tokens=draw.randrange(1, 40), seed=seed)
    begun = False
    async with grpc.aio.insecure_channel(address) as channel:
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        try:
            if draw.random() < 0.3:
                history.complete((await stub.Generate(request)).completion)
                on_complete()
                return
            async for message in stub.GenerateStream(request):
                begun = True
                if message.HasField("completion"):
                    history.complete(message.completion)
                    on_complete()
        except grpc.aio.AioRpcError as error:
            history.fail(error.code().name, begun=begun)


async def kill_at_completion(server: ForkedServer, draw: random.Random, history: History) -> None:
    """Call the server, and kill it when a client has received the last message of a reply."""
    replies = draw.randrange(1, CALLS)
    killed = False

    def on_complete() -> None:
        nonlocal replies, killed
        replies -= 1
        if replies == 0:
            server.kill()
            killed = True

    seeds = [draw.randrange(2**32) for _ in range(CALLS)]
    await asyncio.gather(*(call(server.address, seed, history, on_complete) for seed in seeds))
    assert killed, f"only {len(history.completed)} replies were complete: {history.codes}; see {server.forks.log}"
    assert await asyncio.to_thread(server.wait) == -9


async def kill_servers(forks: Forks, data_directory: Path, card: Path, *, kills: int, seed: int) -> History:
    """Kill one server after the other, all with the same data directory; then a last one recovers the records.

    Half of the servers have a slow disk. There, a reply that does not wait for its commit always loses its record.
    """
    draw, history = random.Random(seed), History()
    flags = ("--card", str(card), "--weights", "demo")
    for kill in range(kills):
        commit_seconds = SLOW_COMMIT_SECONDS * (kill % 2)
        server = await asyncio.to_thread(forks.start, data_directory, *flags, commit_seconds=commit_seconds)
        await kill_at_completion(server, draw, history)
    last = await asyncio.to_thread(forks.start, data_directory, *flags)
    assert await asyncio.to_thread(last.stop) == 0
    return history
