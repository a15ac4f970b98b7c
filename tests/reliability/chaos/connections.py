"""Connections without a key that occupy the server: the next client with a key is served."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import grpc.aio
import h2.connection
from tests.reliability.chaos.history import History
from tests.reliability.chaos.kills import fast_card
from tests.reliability.chaos.scene import Scene
from tests.reliability.chaos.traffic import traffic

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_server.admission.keys.keys_file import new_key

IDLE_CONNECTIONS = 1_000
SILENT_CONNECTIONS = 3_000
SERVED_SECONDS = 60
"""Time within which a client that connects after the others must be served: their idle time is 20 seconds."""
# A channel that shares its connection with others would not connect again.
NEW_CONNECTION = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 1000)]
Metadata = tuple[tuple[str, str], ...]


@asynccontextmanager
async def connections(address: str, count: int, greeting: bytes) -> AsyncIterator[None]:
    """Open connections one after the other, each of which sends the greeting and then nothing."""
    host, _, port = address.rpartition(":")
    with ExitStack() as stack:
        for _ in range(count):
            _, writer = await asyncio.open_connection(host, int(port))
            stack.callback(writer.close)
            writer.write(greeting)
        yield


async def _serve_new_client(address: str, metadata: Metadata, history: History) -> float:
    """Return the seconds in which a new client with a key connects and gets a reply."""
    started_at = time.monotonic()
    async with grpc.aio.insecure_channel(address, options=NEW_CONNECTION) as channel:
        stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        request = pb.GenerateRequest(prompt="Tell me a story.", max_tokens=1, no_cache=True)
        reply = await stub.Generate(request, metadata=metadata, wait_for_ready=True, timeout=SERVED_SECONDS)
        history.complete(reply.completion)
    return time.monotonic() - started_at


async def play_connections(scene: Scene) -> None:
    """Idle HTTP/2 connections, and sockets that send nothing, with the default limits."""
    key, entry = new_key("acme")
    keys = scene.folder / "keys.yaml"
    keys.write_text(f"keys:\n  {entry}\n")
    metadata, data = (("authorization", f"Bearer {key}"),), scene.folder / "data"
    server = await scene.start(
        data, "--card", str(fast_card(scene.folder)), "--weights", "demo", "--api-keys-file", str(keys)
    )
    greeting = h2.connection.H2Connection()
    greeting.initiate_connection()
    kinds = {
        f"{IDLE_CONNECTIONS:,} idle connections": (IDLE_CONNECTIONS, greeting.data_to_send()),
        f"{SILENT_CONNECTIONS:,} TCP connects": (SILENT_CONNECTIONS, b""),
    }
    async with traffic(server.address, scene.draw, metadata=metadata) as running:
        await running.completed(10)
        for name, (count, sent) in kinds.items():
            async with connections(server.address, count, sent):
                try:
                    seconds = await _serve_new_client(server.address, metadata, running.history)
                    scene.figures.append(f"{name}: a new client is served after {seconds:.1f} s")
                except grpc.aio.AioRpcError as error:
                    scene.broken.append(f"{name}: a new client got {error.code().name} after {SERVED_SECONDS} s")
                await running.completed(10)  # clients that are connected are served all the time
    await scene.stop(server)
    scene.check_records(data, running.history)
    scene.check_statuses(running.history)
