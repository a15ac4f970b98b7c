"""Timers of connections, over a real socket: idle time, age, keepalive, pings and handshakes.

These are gRPC's own timers, which no test can control. Each test depends only on a timer that expires, not on how fast
it does.
"""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import grpc.aio
import h2.errors
import h2.events
import pytest
from tests.support.certificates import Authority
from tests.support.deadlines import increasing_timeouts
from tests.support.http2_peer import Http2Peer, wait_until_closed
from tests.support.service import ServiceMaker, remaining_text

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.admission.accounts import ApiKeyAuthenticator
from llama2_server.admission.keys.keys_file import new_key


async def test_idle_connection_is_closed(serve_scripted: ServiceMaker) -> None:
    """A connection without calls is closed; a connection with a call stays open."""
    async with (
        serve_scripted(max_connection_idle_seconds=0.5) as service,
        Http2Peer.connected(service.address, with_call=True) as busy,
        Http2Peer.connected(service.address) as idle,
    ):
        goodbye = await idle.event(h2.events.ConnectionTerminated)
        assert goodbye.additional_data == b"connection idle"
        await idle.closed()
        busy.http2.ping(b"8 bytes.")
        await busy.flush()
        await busy.event(h2.events.PingAckReceived)


@pytest.mark.parametrize("greets", [True, False])
async def test_silent_connections_give_way_to_a_client_with_a_key(
    serve_scripted: ServiceMaker, tmp_path: Path, greets: bool
) -> None:
    """Connections without calls, and sockets without HTTP/2, occupy every connection only until their time is over."""
    key, entry = new_key("42")
    (tmp_path / "keys.yaml").write_text(f"keys:\n  {entry}\n")
    limits = {"max_connections": 3, "max_connection_idle_seconds": 1, "handshake_timeout_seconds": 1}
    async with (
        serve_scripted(accounts=ApiKeyAuthenticator(tmp_path / "keys.yaml"), **limits) as service,
        AsyncExitStack() as silent,
    ):
        host, _, port = service.address.rpartition(":")
        for _ in range(3):
            if greets:
                await silent.enter_async_context(Http2Peer.connected(service.address))
            else:
                _, writer = await asyncio.open_connection(host, int(port))
                silent.callback(writer.close)
        reader, writer = await asyncio.open_connection(host, int(port))
        if greets:
            await wait_until_closed(reader)  # no connection is left
        writer.close()
        metadata = (("authorization", f"Bearer {key}"),)
        reply = await service.text.Generate(
            pb.GenerateRequest(prompt="Hi", max_tokens=1), metadata=metadata, wait_for_ready=True, timeout=60
        )
        assert reply.completion.usage.output_tokens == 1


async def test_old_connection_ends_and_its_calls_complete(serve_scripted: ServiceMaker) -> None:
    """After max_connection_age_seconds, the client must reconnect; a running call continues within the grace period."""
    async with serve_scripted(max_connection_age_seconds=0.5) as service:
        service.model.gate()
        service.model.allow(1)
        call = service.text.GenerateStream(pb.GenerateRequest(prompt="a story"))
        await call.read()
        async with asyncio.timeout(60):
            await service.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        service.model.open_gate()
        assert await remaining_text(call)


async def test_grace_period_of_an_old_connection_ends(serve_scripted: ServiceMaker) -> None:
    """A call that outlasts the grace period is cut off, so that every connection ends."""
    for timeout in increasing_timeouts(0.3):
        ages = {"max_connection_age_seconds": timeout, "max_connection_age_grace_seconds": timeout}
        async with serve_scripted(**ages, queue_timeout_seconds=timeout / 2) as service:
            service.model.gate()
            with pytest.raises(grpc.aio.AioRpcError) as cut:
                await service.text.Generate(pb.GenerateRequest(prompt="a story"))
            assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
            if service.model.in_step.is_set():  # else the connection ended before the call ran
                break


async def test_unresponsive_client_is_disconnected(serve_scripted: ServiceMaker) -> None:
    """A connection whose client answers no ping is closed."""
    async with (
        serve_scripted(keepalive_time_seconds=1, keepalive_timeout_seconds=0.5) as service,
        Http2Peer.connected(service.address) as peer,
    ):
        peer.silent = True
        await peer.closed()


async def test_responsive_client_stays_connected(serve_scripted: ServiceMaker) -> None:
    """A connection whose client answers its pings stays open: the server sends a second ping only after an answer."""
    async with (
        serve_scripted(keepalive_time_seconds=1, keepalive_timeout_seconds=60) as service,
        Http2Peer.connected(service.address) as peer,
    ):
        await peer.event(h2.events.PingReceived)
        await peer.event(h2.events.PingReceived)


async def test_too_many_pings_end_the_connection(serve_scripted: ServiceMaker) -> None:
    """A client that pings more often than min_ping_interval_seconds gets ENHANCE_YOUR_CALM and is disconnected."""
    async with serve_scripted() as service, Http2Peer.connected(service.address) as peer:
        for number in range(4):
            peer.http2.ping(number.to_bytes(8, "big"))
        await peer.flush()
        goodbye = await peer.event(h2.events.ConnectionTerminated)
        assert goodbye.error_code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
        await peer.closed()


async def test_pings_within_the_interval_are_allowed(serve_scripted: ServiceMaker) -> None:
    """A client that respects the interval may send any number of pings, also without a call."""
    async with (
        serve_scripted(min_ping_interval_seconds=0.001) as service,
        Http2Peer.connected(service.address) as peer,
    ):
        for number in range(8):
            peer.http2.ping(number.to_bytes(8, "big"))
            await peer.flush()
            await peer.event(h2.events.PingAckReceived)
            await asyncio.sleep(0.01)  # the peer respects the interval


@pytest.mark.parametrize("tls", [False, True])
async def test_handshake_times_out(serve_scripted: ServiceMaker, authority: Authority, tls: bool) -> None:
    """A client that connects and sends nothing is disconnected, before TLS and before HTTP/2."""
    certificate, key = authority.pair()
    files = {"tls_certificate": certificate, "tls_key": key} if tls else {}
    async with serve_scripted(handshake_timeout_seconds=0.5, **files) as service:
        host, _, port = service.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        await wait_until_closed(reader)
        writer.close()
