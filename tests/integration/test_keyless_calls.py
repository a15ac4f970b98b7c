"""The memory that clients without an API key can hold: open calls, unfinished messages and replies that wait."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import h2.events
import h2.settings
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tests.support.http2_peer import Http2Peer
from tests.support.service import Service, ServiceMaker, details, health_stub, reflection_stub, until

from llama2_server.admission.accounts import ApiKeyAuthenticator
from llama2_server.admission.keys.keys_file import new_key
from llama2_server.api.incoming import keyless_calls
from llama2_server.api.incoming.keyless_calls import MAX_READING, KeylessCalls
from llama2_server.api.server import GRPC_MESSAGE_BYTES, HEALTH_MESSAGE_BYTES, MAX_PENDING_CALLS
from llama2_server.config.settings import Settings

SERVING = health_pb2.HealthCheckResponse.SERVING
HEALTH = {"service": "grpc.health.v1.Health"}
CONNECTION_BYTES = 18_000
CALL_BYTES = 27_000
PENDING_CALL_BYTES = 7_000
WINDOW_BYTES = 65_535  # of a connection; what it sends for calls that are not rejected yet
OTHER_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
EMPTY_MESSAGE = bytes(5)
RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED = "8", "4"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[KeylessCalls]:
    """Return the limits of the servers that the test starts."""
    created: list[KeylessCalls] = []
    init = KeylessCalls.__init__

    def recorded(calls: KeylessCalls, max_calls: int) -> None:
        init(calls, max_calls)
        created.append(calls)

    monkeypatch.setattr(KeylessCalls, "__init__", recorded)
    return created


async def check(service: Service, **options: Any) -> int:
    """Return the state of the server."""
    return int((await health_stub(service.channel).Check(health_pb2.HealthCheckRequest(), **options)).status)


@asynccontextmanager
async def watching(service: Service, count: int, **options: Any) -> AsyncIterator[list[Any]]:
    """Open watches that have received the state, for the body."""
    watches = [health_stub(service.channel).Watch(health_pb2.HealthCheckRequest(), **options) for _ in range(count)]
    for watch in watches:
        assert (await watch.read()).status == SERVING
    yield watches
    for watch in watches:
        watch.cancel()


async def next_status(peer: Http2Peer) -> tuple[int, str]:
    """Return the stream and the status of the next call that fails before its reply."""
    answer = await peer.event(h2.events.ResponseReceived)
    headers: dict[Any, Any] = dict(answer.headers or ())
    return answer.stream_id, str(headers.get("grpc-status", "0"))


async def reason(call: Any) -> str:
    """Return the reason of a failed call."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return str(details(failed.value)["ErrorInfo"].reason)  # type: ignore[attr-defined]


def test_all_peers_without_a_key_hold_little_memory() -> None:
    """The limits, multiplied: connections, open calls and incomplete messages, on both ports.

    The bytes per connection and per call are measured by `python -m benchmarks.measurement.unauthenticated`.
    """
    settings = Settings.model_validate({})
    connections = settings.max_connections
    main_port = (
        connections * (CONNECTION_BYTES + WINDOW_BYTES)
        + MAX_PENDING_CALLS * PENDING_CALL_BYTES  # of all connections and streams
        + (settings.max_keyless_calls + connections) * (CALL_BYTES - CONNECTION_BYTES)
        + MAX_READING * GRPC_MESSAGE_BYTES
    )
    assert main_port < 64 * 1024 * 1024
    assert MAX_READING * 2 * HEALTH_MESSAGE_BYTES < 1024 * 1024


async def test_open_calls_are_limited(serve_scripted: ServiceMaker, opened: list[KeylessCalls]) -> None:
    """Beyond the limit, a connection with an open call gets no other; a new connection gets one."""
    async with serve_scripted(max_keyless_calls=2) as service, watching(service, 2) as watches:
        watch = health_stub(service.channel).Watch(health_pb2.HealthCheckRequest())
        assert await reason(watch.read()) == "TOO_MANY_REQUESTS"
        assert await reason(health_stub(service.channel).Check(health_pb2.HealthCheckRequest())) == "TOO_MANY_REQUESTS"
        async with grpc.aio.insecure_channel(service.address, OTHER_CONNECTION) as channel:
            assert (await health_stub(channel).Check(health_pb2.HealthCheckRequest())).status == SERVING
            other = health_stub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await other.read()).status == SERVING
            assert await reason(health_stub(channel).Check(health_pb2.HealthCheckRequest())) == "TOO_MANY_REQUESTS"
        for watch in watches:
            watch.cancel()
        await until(lambda: len(opened[-1]) == 0)


async def test_reflection_counts(serve_scripted: ServiceMaker) -> None:
    """An open reflection call is a call without a key."""
    async with serve_scripted(max_keyless_calls=1) as service:
        call = reflection_stub(service.channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await call.read()
        assert await reason(health_stub(service.channel).Check(health_pb2.HealthCheckRequest())) == "TOO_MANY_REQUESTS"
        call.cancel()


async def test_calls_with_a_key_are_not_limited(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """A watch with a valid key does not count."""
    key, entry = new_key("42")
    file = tmp_path / "keys.yaml"
    file.write_text(f"keys:\n  {entry}\n")
    metadata = (("authorization", f"Bearer {key}"),)
    wrong = (("authorization", "Bearer x"),)
    async with (
        serve_scripted(accounts=ApiKeyAuthenticator(file), max_keyless_calls=1) as service,
        watching(service, 3, metadata=metadata),
        watching(service, 1),
    ):
        watch = health_stub(service.channel).Watch(health_pb2.HealthCheckRequest(), metadata=wrong)
        assert await reason(watch.read()) == "TOO_MANY_REQUESTS"


async def test_the_oldest_unfinished_message_gives_way(
    serve_scripted: ServiceMaker, opened: list[KeylessCalls], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that never complete their message do not lock out a new call: the oldest one ends."""
    monkeypatch.setattr(keyless_calls, "MAX_READING", 2)
    async with serve_scripted() as service, Http2Peer.connected(service.address) as peer:
        streams = []
        for _ in range(2):
            streams.append(await peer.start_call(service.address, **HEALTH, method="Check"))
            peer.http2.send_data(streams[-1], b"\0" + (1000).to_bytes(4, "big") + b"the message begins")
            await peer.flush()
            await until(lambda: len(opened[-1]) == len(streams))
        assert await check(service) == SERVING
        assert await next_status(peer) == (streams[0], RESOURCE_EXHAUSTED)
        await until(lambda: len(opened[-1]) == 1)


async def test_an_unfinished_message_times_out(
    serve_scripted: ServiceMaker, opened: list[KeylessCalls], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message must be complete within READ_SECONDS."""
    monkeypatch.setattr(keyless_calls, "READ_SECONDS", 0.1)
    async with serve_scripted() as service, Http2Peer.connected(service.address) as peer:
        stream = await peer.start_call(service.address, **HEALTH, method="Check")
        assert await next_status(peer) == (stream, DEADLINE_EXCEEDED)
        await until(lambda: len(opened[-1]) == 0)


async def test_a_disconnected_client_frees_its_calls(serve_scripted: ServiceMaker, opened: list[KeylessCalls]) -> None:
    """An unfinished message is not counted after its connection has closed."""
    async with serve_scripted() as service:
        async with Http2Peer.connected(service.address) as peer:
            await peer.start_call(service.address, **HEALTH, method="Check")
            await peer.start_call(service.address, **HEALTH, method="Watch")
            await until(lambda: len(opened[-1]) == 2)
        await until(lambda: len(opened[-1]) == 0)


async def test_replies_that_wait_for_their_client_are_limited(
    serve_scripted: ServiceMaker, opened: list[KeylessCalls]
) -> None:
    """A client that accepts no data cannot collect replies; other clients are served."""
    async with serve_scripted(max_keyless_calls=2) as service, Http2Peer.connected(service.address) as peer:
        peer.http2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        await peer.flush()
        await peer.event(h2.events.SettingsAcknowledged)
        for _ in range(3):
            stream = await peer.start_call(service.address, **HEALTH, method="Check")
            peer.http2.send_data(stream, EMPTY_MESSAGE, end_stream=True)
            await peer.flush()
        while (status := await next_status(peer)) != (stream, RESOURCE_EXHAUSTED):
            assert status[1] == "0"
        assert len(opened[-1]) == 2
        assert await check(service) == SERVING
