"""Limits of messages, metadata, connections and streams, over a real socket."""

import asyncio
import re

import grpc
import grpc.aio
import h2.errors
import h2.events
import h2.settings
import pytest
from grpc_health.v1 import health_pb2
from tests.support.http2_peer import Http2Peer, wait_until_closed
from tests.support.repository import ROOT
from tests.support.service import ServiceMaker, details, generate

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.api.server import GRPC_MESSAGE_BYTES, connection_options
from llama2_server.config.settings import Settings

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_too_large_message_is_rejected(serve_scripted: ServiceMaker, compression: grpc.Compression) -> None:
    """One byte more than max_message_bytes is INVALID_ARGUMENT with both sizes; compression changes nothing."""
    async with serve_scripted(max_message_bytes=2000) as service:
        fits = pb.CountTokensRequest(prompt="a" * 1997)  # and two bytes for the length, one for the field's number
        assert fits.ByteSize() == 2000
        assert (await service.text.CountTokens(fits)).input_tokens > 0
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await service.text.CountTokens(pb.CountTokensRequest(prompt="a" * 1998), compression=compression)
        assert rejected.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "2001 bytes; at most 2000 are allowed" in str(rejected.value.details())
        found = details(rejected.value)
        assert (found["ErrorInfo"].reason, set(found)) == (  # type: ignore[attr-defined]
            "REQUEST_TOO_LARGE",
            {"ErrorInfo", "BadRequest", "RequestInfo"},
        )


async def test_grpc_rejects_extremely_large_messages(serve_scripted: ServiceMaker) -> None:
    """A message beyond gRPC's own limit is not read: RESOURCE_EXHAUSTED without details; the connection stays open."""
    async with serve_scripted(max_message_bytes=2000) as service:
        for size, code in (
            (GRPC_MESSAGE_BYTES - 100, grpc.StatusCode.INVALID_ARGUMENT),
            (GRPC_MESSAGE_BYTES, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as rejected:
                await service.text.CountTokens(pb.CountTokensRequest(prompt="a" * size))
            assert rejected.value.code() is code
        assert (await service.text.CountTokens(pb.CountTokensRequest(prompt="Hi"))).input_tokens > 0


async def test_limit_can_exceed_the_default_of_grpc(serve_scripted: ServiceMaker) -> None:
    """The limit of gRPC itself is twice the setting if that is more than its default."""
    limit = 2 * GRPC_MESSAGE_BYTES
    async with serve_scripted(max_message_bytes=limit) as service:
        for size in (limit - 100, 2 * limit - 100):
            with pytest.raises(grpc.aio.AioRpcError) as rejected:
                await service.text.CountTokens(pb.CountTokensRequest(prompt="a" * size))
            info = details(rejected.value)["ErrorInfo"]
            expected = "INVALID_REQUEST" if size < limit else "REQUEST_TOO_LARGE"
            assert info.reason == expected  # type: ignore[attr-defined]


async def test_too_large_metadata_is_rejected(serve_scripted: ServiceMaker) -> None:
    """Metadata beyond max_metadata_bytes is always rejected, never at random; the connection stays open."""
    async with serve_scripted(max_metadata_bytes=4096) as service:
        request = pb.CountTokensRequest(prompt="Hi")
        async with Http2Peer.connected(service.address) as peer:
            assert peer.setting(h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE) == 4096
            # gRPC clients respect that setting; this peer ignores it.
            for size in (4200, 8000):
                stream = await peer.start_call(service.address, ("x-large", "a" * size))
                answer = await peer.event(h2.events.ResponseReceived)
                assert answer.stream_id == stream
                assert ("grpc-status", "8") in (answer.headers or ())
        await service.text.CountTokens(request, metadata=(("x-fits", "a" * 3000),))


async def test_metadata_within_the_limit_is_never_rejected(serve_scripted: ServiceMaker) -> None:
    """Without the setting, gRPC would reject some metadata above 8 KB at random."""
    async with serve_scripted(max_metadata_bytes=40_000) as service:
        for _ in range(10):
            await service.text.CountTokens(pb.CountTokensRequest(prompt="Hi"), metadata=(("x-fits", "a" * 38_000),))


async def test_max_connections(serve_scripted: ServiceMaker) -> None:
    """A connection beyond max_connections is closed immediately; a closed connection makes room for a new one."""
    async with serve_scripted(max_connections=2) as service:
        host, _, port = service.address.rpartition(":")
        async with Http2Peer.connected(service.address) as first:
            async with Http2Peer.connected(service.address):
                reader, writer = await asyncio.open_connection(host, int(port))
                await wait_until_closed(reader)
                writer.close()
            first.http2.ping(b"8 bytes.")
            await first.flush()
            await first.event(h2.events.PingAckReceived)
        assert (await service.text.CountTokens(pb.CountTokensRequest(prompt="Hi"), wait_for_ready=True)).input_tokens


async def test_max_concurrent_streams(serve_scripted: ServiceMaker) -> None:
    """The server announces max_concurrent_streams and enforces it on each connection."""
    async with serve_scripted(max_concurrent_streams=3) as service, Http2Peer.connected(service.address) as peer:
        assert peer.setting(h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS) == 3
        peer.http2.remote_settings.update({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 1000})
        peer.http2.remote_settings.acknowledge()  # the peer forgets the announced limit
        streams = [await peer.start_call(service.address) for _ in range(4)]
        rejected = await peer.event(h2.events.StreamReset)
        assert rejected.stream_id == streams[-1]
        assert rejected.error_code == h2.errors.ErrorCodes.REFUSED_STREAM


async def test_default_of_max_concurrent_streams(serve_scripted: ServiceMaker) -> None:
    """All calls that the service can admit fit into one connection, for example of a proxy; at least 100 do."""
    for queue_size, streams in ((64, 100), (300, 301)):
        async with (
            serve_scripted(max_queue_size=queue_size) as service,
            Http2Peer.connected(service.address) as peer,
        ):
            assert peer.setting(h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS) == streams


async def test_all_calls_of_a_full_queue_come_from_one_channel(serve_scripted: ServiceMaker) -> None:
    """A client with one channel can fill the slots and the queue, and each of its calls is served."""
    async with serve_scripted() as service:
        service.model.gate()
        running = asyncio.create_task(generate(service, "first", 1))
        await service.wait_until_in_step()
        calls = [asyncio.create_task(generate(service, f"call {index}", 1)) for index in range(64)]
        await service.wait_until_queued(64)
        service.model.open_gate()
        assert all(reply.completion.usage.output_tokens for reply in await asyncio.gather(running, *calls))


async def test_default_of_max_message_bytes(serve_scripted: ServiceMaker) -> None:
    """The longest text that fits into the card's context is accepted; twice as much is rejected with details."""
    async with serve_scripted() as service:
        text = " once upon a time there was" * 138  # 3,726 characters
        messages = [pb.ChatMessage(role="assistant" if index % 2 else "user", content=text) for index in range(3)]
        fits = pb.CountTokensRequest(messages=messages)
        assert (await service.text.CountTokens(fits)).input_tokens > 1000
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await service.text.CountTokens(pb.CountTokensRequest(messages=messages * 5))
        assert details(rejected.value)["ErrorInfo"].reason == "REQUEST_TOO_LARGE"  # type: ignore[attr-defined]


def test_infinite_times_are_the_largest_of_grpc() -> None:
    """`inf` in a connection setting means never, like the largest number in gRPC."""
    settings = Settings.model_validate({"max_connection_age_seconds": "inf", "max_connection_idle_seconds": 1e300})
    options = dict(connection_options(settings, streams=1, message_bytes=1))
    assert options["grpc.max_connection_age_ms"] == options["grpc.max_connection_idle_ms"] == 2**31 - 1


def test_documented_defaults() -> None:
    """docs/networking.md has every limit of the settings with its default."""
    table = (ROOT / "docs/networking.md").read_text()
    documented = dict(re.findall(r"\| `(\w+)` \| (\S+) \|", table))
    limits = {
        name: "none" if field.default is None else str(field.default)
        for name, field in Settings.model_fields.items()
        if name.startswith(("max_", "connection_", "keepalive_", "min_ping_", "handshake_"))
        and name not in ("max_position_embeddings", "max_mixed_step_seconds")  # of the model; they limit no client
    }
    assert limits.items() <= documented.items()
    assert all(
        str(Settings.model_fields[name].default) == value for name, value in documented.items() if value != "none"
    )
