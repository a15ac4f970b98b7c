"""What a peer can let grow has a limit: messages, metadata, streams, connections, pings, handshakes."""

import asyncio
import re

import grpc
import grpc.aio
import h2.errors
import h2.events
import h2.settings
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tests.support.certificates import Authority
from tests.support.http2_peer import Http2Peer
from tests.support.processes import free_port
from tests.support.repository import ROOT
from tests.support.service import ServiceMaker, details, health_stub, reflection_stub, remaining_text

from llama2.v1 import model_pb2, model_pb2_grpc
from llama2.v1 import text_generation_pb2 as pb
from llama2_server.api.server import GRPC_MESSAGE_BYTES, connection_options, health_port
from llama2_server.config.settings import Settings

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def closed(reader: asyncio.StreamReader) -> None:
    """Wait until the server closes the connection."""
    async with asyncio.timeout(20):
        try:
            while await reader.read(4096):
                pass
        except OSError:
            return


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_a_message_that_is_too_large_is_rejected(
    serve_scripted: ServiceMaker, compression: grpc.Compression
) -> None:
    """One byte more than max_message_bytes is INVALID_ARGUMENT with both sizes; compression changes nothing."""
    async with serve_scripted(max_message_bytes=2000) as service:
        fits = pb.CountTokensRequest(prompt="a" * 1997)  # two bytes of length and one of the field's number
        assert fits.ByteSize() == 2000
        assert (await service.text.CountTokens(fits)).input_tokens > 0
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.text.CountTokens(pb.CountTokensRequest(prompt="a" * 1998), compression=compression)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "2001 bytes; at most 2000 are allowed" in str(refused.value.details())
        found = details(refused.value)
        assert (found["ErrorInfo"].reason, set(found)) == (  # type: ignore[attr-defined]
            "REQUEST_TOO_LARGE",
            {"ErrorInfo", "BadRequest", "RequestInfo"},
        )


async def test_grpc_rejects_a_message_that_is_far_too_large(serve_scripted: ServiceMaker) -> None:
    """Beyond gRPC's own limit the message is never read: RESOURCE_EXHAUSTED without details; the connection goes on."""
    async with serve_scripted(max_message_bytes=2000) as service:
        for size, code in (
            (GRPC_MESSAGE_BYTES - 100, grpc.StatusCode.INVALID_ARGUMENT),
            (GRPC_MESSAGE_BYTES, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await service.text.CountTokens(pb.CountTokensRequest(prompt="a" * size))
            assert refused.value.code() is code
        assert (await service.text.CountTokens(pb.CountTokensRequest(prompt="Hi"))).input_tokens > 0


async def test_the_limit_can_exceed_grpcs_default(serve_scripted: ServiceMaker) -> None:
    """GRPC's own limit is twice the setting if that is more than its default."""
    limit = 2 * GRPC_MESSAGE_BYTES
    async with serve_scripted(max_message_bytes=limit) as service:
        for size in (limit - 100, 2 * limit - 100):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await service.text.CountTokens(pb.CountTokensRequest(prompt="a" * size))
            info = details(refused.value)["ErrorInfo"]
            expected = "INVALID_REQUEST" if size < limit else "REQUEST_TOO_LARGE"
            assert info.reason == expected  # type: ignore[attr-defined]


async def test_metadata_that_is_too_large_is_refused(serve_scripted: ServiceMaker) -> None:
    """Metadata beyond max_metadata_bytes is refused, always, and not by chance; the connection goes on."""
    async with serve_scripted(max_metadata_bytes=4096) as service:
        request = pb.CountTokensRequest(prompt="Hi")
        async with Http2Peer.connected(service.address) as peer:
            assert peer.setting(h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE) == 4096
            # gRPC's clients look at that setting. This peer does not.
            for size in (4200, 8000):
                stream = await peer.start_call(service.address, ("x-large", "a" * size))
                answer = await peer.event(h2.events.ResponseReceived)
                assert answer.stream_id == stream
                assert ("grpc-status", "8") in (answer.headers or ())
        await service.text.CountTokens(request, metadata=(("x-fits", "a" * 3000),))


async def test_metadata_within_the_limit_is_never_refused(serve_scripted: ServiceMaker) -> None:
    """Not even by chance, as gRPC by itself does above 8 KB."""
    async with serve_scripted(max_metadata_bytes=40_000) as service:
        for _ in range(10):
            await service.text.CountTokens(pb.CountTokensRequest(prompt="Hi"), metadata=(("x-fits", "a" * 38_000),))


async def test_connections_have_a_limit(serve_scripted: ServiceMaker) -> None:
    """One more than max_connections is closed as it comes; when one goes there is room again."""
    async with serve_scripted(max_connections=2) as service:
        host, _, port = service.address.rpartition(":")
        async with Http2Peer.connected(service.address) as first:
            async with Http2Peer.connected(service.address):
                reader, writer = await asyncio.open_connection(host, int(port))
                await closed(reader)
                writer.close()
            first.http2.ping(b"are you?")
            await first.flush()
            await first.event(h2.events.PingAckReceived)
        assert (await service.text.CountTokens(pb.CountTokensRequest(prompt="Hi"), wait_for_ready=True)).input_tokens


async def test_streams_have_a_limit(serve_scripted: ServiceMaker) -> None:
    """A connection has at most max_concurrent_streams calls at once, told to the peer and held against it."""
    async with serve_scripted(max_concurrent_streams=3) as service, Http2Peer.connected(service.address) as peer:
        assert peer.setting(h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS) == 3
        peer.http2.remote_settings.update({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 1000})
        peer.http2.remote_settings.acknowledge()  # the peer forgets what it was told
        streams = [await peer.start_call(service.address) for _ in range(4)]
        refused = await peer.event(h2.events.StreamReset)
        assert refused.stream_id == streams[-1]
        assert refused.error_code == h2.errors.ErrorCodes.REFUSED_STREAM


async def test_streams_have_room_for_slots_and_line_by_default(serve_scripted: ServiceMaker) -> None:
    """All calls that the service can take fit into one connection, such as a proxy's."""
    async with serve_scripted(max_queue_size=300) as service, Http2Peer.connected(service.address) as peer:
        assert peer.setting(h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS) == 300 + 1 + 100


async def test_an_idle_connection_is_closed(serve_scripted: ServiceMaker) -> None:
    """A connection without calls is said goodbye to; with a call it stays."""
    async with (
        serve_scripted(max_connection_idle_seconds=0.5) as service,
        Http2Peer.connected(service.address) as busy,
        Http2Peer.connected(service.address) as idle,
    ):
        await busy.start_call(service.address)
        goodbye = await idle.event(h2.events.ConnectionTerminated)
        assert goodbye.additional_data == b"connection idle"
        await idle.closed()
        busy.http2.ping(b"are you?")
        await busy.flush()
        await busy.event(h2.events.PingAckReceived)


async def test_an_old_connection_ends_and_its_calls_may_finish(serve_scripted: ServiceMaker) -> None:
    """After max_connection_age_seconds the peer is asked to go elsewhere; its call goes on within the grace."""
    async with serve_scripted(max_connection_age_seconds=0.5) as service:
        service.model.gate()
        service.model.allow(1)
        call = service.text.GenerateStream(pb.GenerateRequest(prompt="a story"))
        await call.read()
        async with asyncio.timeout(20):
            await service.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        service.model.open_gate()
        assert await remaining_text(call)


async def test_the_grace_of_an_old_connection_ends(serve_scripted: ServiceMaker) -> None:
    """A call that goes on after the grace is cut off, so that no connection lives for ever."""
    ages = {"max_connection_age_seconds": 0.3, "max_connection_age_grace_seconds": 0.3, "queue_timeout_seconds": 0.1}
    async with serve_scripted(**ages) as service:
        service.model.gate()
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await service.text.Generate(pb.GenerateRequest(prompt="a story"))
        assert cut.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_peer_that_went_away_is_noticed(serve_scripted: ServiceMaker) -> None:
    """A connection whose peer answers no ping is closed; one whose peer does goes on."""
    async with (
        serve_scripted(keepalive_time_seconds=1, keepalive_timeout_seconds=0.5) as service,
        Http2Peer.connected(service.address) as gone,
        Http2Peer.connected(service.address) as there,
    ):
        gone.silent = True
        await asyncio.gather(gone.closed(), there.event(h2.events.PingReceived))
        await there.event(h2.events.PingReceived)


async def test_too_many_pings_are_answered_with_goodbye(serve_scripted: ServiceMaker) -> None:
    """A peer that pings more often than min_ping_interval_seconds is told to calm down and sent away."""
    async with serve_scripted() as service, Http2Peer.connected(service.address) as peer:
        for number in range(4):
            peer.http2.ping(number.to_bytes(8, "big"))
        await peer.flush()
        goodbye = await peer.event(h2.events.ConnectionTerminated)
        assert goodbye.error_code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
        await peer.closed()


async def test_pings_within_the_interval_are_welcome(serve_scripted: ServiceMaker) -> None:
    """A peer that keeps to the interval may ping for ever, without a call as well."""
    async with (
        serve_scripted(min_ping_interval_seconds=0.001) as service,
        Http2Peer.connected(service.address) as peer,
    ):
        for number in range(8):
            peer.http2.ping(number.to_bytes(8, "big"))
            await peer.flush()
            await peer.event(h2.events.PingAckReceived)
            await asyncio.sleep(0.01)  # the peer keeps to the interval


@pytest.mark.parametrize("tls", [False, True])
async def test_a_handshake_has_a_time_limit(serve_scripted: ServiceMaker, authority: Authority, tls: bool) -> None:
    """Who connects and says nothing is hung up on, before TLS and before HTTP/2."""
    certificate, key = authority.pair()
    files = {"tls_certificate": certificate, "tls_key": key} if tls else {}
    async with serve_scripted(handshake_timeout_seconds=0.5, **files) as service:
        host, _, port = service.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        await closed(reader)
        writer.close()


async def test_the_health_port_serves_health_only() -> None:
    """Plaintext Check and Watch, no other service, no reflection."""
    settings = Settings.model_validate({"health_listen": "127.0.0.1:0"})
    async with health_port(settings) as health:
        assert health.address is not None
        async with grpc.aio.insecure_channel(health.address) as channel:
            stub = health_stub(channel)
            assert (await stub.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
            assert (await stub.Check(health_pb2.HealthCheckRequest(service="liveness"))).status == SERVING
            health.servicer.set_serving(True)
            for name in ("", "llama2.v1.TextGenerationService"):
                assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == SERVING
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await model_pb2_grpc.ModelServiceStub(channel).GetModelCard(model_pb2.GetModelCardRequest())
            assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
            call = reflection_stub(channel).ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_probes_speak_no_tls(serve_scripted: ServiceMaker, authority: Authority) -> None:
    """With TLS on the services' port, the health port answers in plain text, and tells of the same service."""
    certificate, key = authority.pair()
    health = f"127.0.0.1:{free_port()}"
    async with (
        serve_scripted(tls_certificate=certificate, tls_key=key, health_listen=health),
        grpc.aio.insecure_channel(health) as channel,
    ):
        assert (await health_stub(channel).Check(health_pb2.HealthCheckRequest())).status == SERVING


def test_a_time_without_end_is_grpcs_longest() -> None:
    """`inf` in a setting of the wire means never, as gRPC's largest number does."""
    settings = Settings.model_validate({"max_connection_age_seconds": "inf", "max_connection_idle_seconds": 1e300})
    options = dict(connection_options(settings, streams=1, message_bytes=1))
    assert options["grpc.max_connection_age_ms"] == options["grpc.max_connection_idle_ms"] == 2**31 - 1


def test_the_table_of_limits_tells_the_defaults() -> None:
    """docs/networking.md names every limit of the settings with the default that is in force."""
    table = (ROOT / "docs/networking.md").read_text()
    told = dict(re.findall(r"\| `(\w+)` \| (\S+) \|", table))
    limits = {
        name: "none" if field.default is None else str(field.default)
        for name, field in Settings.model_fields.items()
        if name.startswith(("max_", "connection_", "keepalive_", "min_ping_", "handshake_"))
        and name != "max_position_embeddings"  # describes the checkpoint and limits no client
    }
    assert limits.items() <= told.items()
    assert all(str(Settings.model_fields[name].default) == value for name, value in told.items() if value != "none")


async def test_nothing_said_or_shown_is_logged(
    serve_scripted: ServiceMaker, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """No prompt, reply or key in any log line at any level, nor in an error, whatever becomes of the call."""
    key = "l2_plainly-not-a-known-key"
    credentials = (("authorization", f"Bearer {key}"),)
    prompt, reply = "xylophone", "marmalade"
    errors = []
    with caplog.at_level(1):
        async with serve_scripted(f"{reply} {reply}") as service:
            good = pb.GenerateRequest(prompt=prompt)
            await service.text.Generate(good, metadata=credentials)
            service.model.failure = RuntimeError("broken")
            for request in (
                good,
                pb.GenerateRequest(prompt=prompt, max_tokens=10**6, stop=[prompt] * 9, top_p=7),
                pb.GenerateRequest(messages=[pb.ChatMessage(role=prompt, content=prompt)]),
                pb.GenerateRequest(prompt=f"{prompt} " * 2000),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await service.text.Generate(request, metadata=credentials)
                errors.append(f"{refused.value.details()} {dict(refused.value.trailing_metadata() or ())}")
    lines = [*caplog.messages, caplog.text, *capfd.readouterr(), *errors]
    assert len(caplog.messages) > 1
    for secret in (prompt, reply, key):
        assert not [line for line in lines if secret in line]
