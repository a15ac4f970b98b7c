"""SIGKILL at the moment when a client receives the last message of a reply."""

import asyncio
import random
from pathlib import Path

import grpc.aio
from tests.reliability.chaos.history import History, interrupted, read_records
from tests.reliability.chaos.scene import Scene
from tests.reliability.chaos.traffic import call
from tests.support.forks import ForkedServer, Forks
from tests.support.processes import card_file

SLOTS = 4
CALLS = 6
"""Concurrent calls of each server."""
SLOW_COMMIT_SECONDS = 0.05
UNLIMITED = {"default": 1_000_000, "accounts": {}}


def fast_card(folder: Path) -> Path:
    """Return a card for many short replies: several slots, no response cache, and no limit of requests."""
    return card_file(folder, max_concurrent_requests=SLOTS, infer_response_cache=None, max_requests_per_min=UNLIMITED)


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
    async with grpc.aio.insecure_channel(server.address) as channel:
        await asyncio.gather(*(call(channel, random.Random(seed), history, on_complete) for seed in seeds))
    assert killed, f"calls failed before a kill: {history.failures}; see {server.forks.log}"
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


async def play_kills(scene: Scene, kills: int) -> None:
    """SIGKILL at completion: each record has the tokens that the client was told."""
    data = scene.folder / "data"
    seed = scene.draw.randrange(2**32)
    history = await kill_servers(scene.forks, data, fast_card(scene.folder), kills=kills, seed=seed)
    scene.check_records(data, history)
    scene.check_statuses(history, "UNAVAILABLE")  # the connections of the killed servers
    cut = interrupted(read_records(data).values())
    scene.figures.append(f"{kills} kills, {len(history.completed)} complete replies, {cut} interrupted requests")
