"""Two replicas that share generations through a real Redis."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import redis.asyncio as redis_library
from tests.integration.service.conftest import caching_card as caching_card  # noqa: PLC0414 - a fixture
from tests.support.servers.redis_server import RedisServer, running_redis
from tests.support.service import Service, ServiceMaker

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard
from llama2_server.generation.generation import Generation
from llama2_server.generation.replicas import leases

STORY = pb.GenerateRequest(prompt="a story")
REPLY = "Once upon a time, a fox 🦊 lived by the sea."
RESULTS = ("computed", "joined", "recomputed", "failed", "unshared")
PATIENT_LEASE_SECONDS = 120


@pytest.fixture
def patient_leases(monkeypatch: pytest.MonkeyPatch, patient_stores: None) -> None:
    """Let a lease live longer than a busy machine pauses: it ends only if its owner or the test ends it."""
    monkeypatch.setattr(leases, "LEASE_SECONDS", PATIENT_LEASE_SECONDS)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Run a Redis for the test."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with running_redis(folder) as server:
        yield server


class Replicas:
    """Starts replicas that share generations, by their names."""

    def __init__(self, serve: ServiceMaker, redis: RedisServer, card: ModelCard, folder: Path) -> None:
        self._serve = serve
        self._redis = redis
        self._card = card
        self.folder = folder

    @asynccontextmanager
    async def __call__(self, name: str, **options: Any) -> AsyncIterator[Service]:
        """Run a replica for the body; each has its own data directory."""
        defaults = {"card": self._card, "redis_url": self._redis.url, "coalesce_across_replicas": True}
        arguments = defaults | {"data_directory": self.folder / name, "reply": REPLY} | options
        async with self._serve(arguments.pop("reply"), **arguments) as service:
            yield service


@pytest.fixture
def replica(serve_scripted: ServiceMaker, redis: RedisServer, caching_card: ModelCard, tmp_path: Path) -> Replicas:
    """Return the function that runs a replica by its name."""
    return Replicas(serve_scripted, redis, caching_card, tmp_path)


def results(service: Service) -> dict[str, int]:
    """Return what the generations of a replica have found, without zeros."""
    value = service.metrics.registry.get_sample_value
    counts = {name: value("llama2_shared_generations_total", {"result": name}) for name in RESULTS}
    return {name: int(count) for name, count in counts.items() if count}


def prefills(*services: Service) -> list[int]:
    """Return the number of prompts that each model has processed."""
    return [service.model.prefills for service in services]


async def follow(service: Service, **fields: Any) -> Any:
    """Return a call that has read the first text of another replica's reply, and the text."""
    call: Any = service.text.GenerateStream(pb.GenerateRequest(**({"prompt": "a story"} | fields)))
    message = await call.read()
    assert isinstance(message, pb.GenerateStreamResponse)
    assert message.response
    assert REPLY.startswith(message.response)
    return call, message.response


async def fail(call: Any) -> grpc.aio.AioRpcError:
    """Return the error of a call that breaks off."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await rest_of(call)
    return error.value


@asynccontextmanager
async def redis_client(server: RedisServer) -> AsyncIterator[Any]:
    """Yield a client of the test's Redis."""
    async with redis_library.Redis.from_url(server.url, protocol=2) as client:
        yield client


async def expire_leases(redis: RedisServer) -> None:
    """Let the time of all leases pass."""
    async with redis_client(redis) as client:
        await client.delete(*[name async for name in client.scan_iter("llama2:reply:*")])


async def names_of(client: Any, suffix: str = "") -> list[bytes]:
    """Return the names of the keys of shared replies; without a suffix, of the leases."""
    names = [name async for name in client.scan_iter("llama2:reply:*")]
    return [name for name in names if name.endswith(b"}" + suffix.encode())]


async def until_in_redis(look: Callable[[], Awaitable[Any]], wanted: Any) -> None:
    """Wait until a look into Redis returns the wanted value; the timeout only ends a test that hangs."""
    async with asyncio.timeout(60):
        while await look() != wanted:
            await asyncio.sleep(0)


async def rest_of(call: Any) -> tuple[str, pb.Completion]:
    """Read a stream to its end, and return the text and the completion."""
    text, completion = "", pb.Completion()
    while isinstance(message := await call.read(), pb.GenerateStreamResponse):
        text += message.response
        completion = message.completion
    return text, completion


def stops(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Return an event that is set when a generation with a slot stops."""
    stopped, stop = asyncio.Event(), Generation.stop

    def stop_and_tell(generation: Generation) -> None:
        stop(generation)
        if generation.end is None and generation.computed_tokens.input_tokens:
            stopped.set()

    monkeypatch.setattr(Generation, "stop", stop_and_tell)
    return stopped
