"""Floods of raw HTTP/2 by peers without a key, while clients with a key call."""

import asyncio
import functools
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path

import grpc.aio
import h2.exceptions
import h2.settings
from grpc_health.v1 import health_pb2
from tests.reliability.chaos.kills import fast_card
from tests.reliability.chaos.scene import SERVING, Scene, percentile
from tests.reliability.chaos.traffic import traffic
from tests.support.http2_peer import Http2Peer
from tests.support.service import health_stub

from llama2_server.admission.keys.keys_file import new_key

FLOOD_SECONDS = 4.0
CONNECTIONS = 4
IDLE_CONNECTIONS = 150
"""Below the default of `max_connections`: the scene `connections` occupies all of them."""
MAX_GROWTH_BYTES = 64 * 1024 * 1024
SPARE_FILES = 10
Burst = Callable[[Http2Peer, str], Awaitable[None]]


async def _reset_calls(peer: Http2Peer, address: str) -> None:
    for _ in range(50):
        peer.http2.reset_stream(peer.send_call_headers(address))


async def _send_unfinished_messages(peer: Http2Peer, address: str) -> None:
    for _ in range(20):
        stream = peer.send_call_headers(address)
        size = min(peer.http2.local_flow_control_window(stream), peer.http2.max_outbound_frame_size)
        peer.http2.send_data(stream, (b"\0" + (2**20).to_bytes(4, "big") + bytes(size))[:size])
    await peer.flush()
    await asyncio.sleep(0.1)


async def _ping(peer: Http2Peer, address: str) -> None:
    for number in range(50):
        peer.http2.ping(number.to_bytes(8, "big"))


async def _change_settings(peer: Http2Peer, address: str) -> None:
    for number in range(50):
        peer.http2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 60_000 + number})


async def _send_empty_frames(peer: Http2Peer, address: str) -> None:
    stream = peer.send_call_headers(address)
    for _ in range(200):
        peer.http2.send_data(stream, b"")


async def _send_long_headers(peer: Http2Peer, address: str) -> None:
    for number in range(10):
        peer.send_call_headers(address, (f"x-header-{number}", "x" * 12_000))


async def _prioritize(peer: Http2Peer, address: str) -> None:
    for stream in range(1, 400, 2):
        peer.http2.prioritize(stream, weight=1 + stream % 256)


async def _continue_headers(peer: Http2Peer, address: str) -> None:
    """Send the headers of a call in parts without an end. A frame is its size, kind, flags, stream and body."""
    stream = peer.http2.get_next_available_stream_id()
    body = b"\x00\x01a\x01b" * 100  # a header without an index: its name and its value
    end = bytes([0]) + stream.to_bytes(4, "big") + body
    peer.send_bytes(b"".join(len(body).to_bytes(3, "big") + bytes([kind]) + end for kind in (1, *[9] * 200)))


BURSTS: dict[str, Burst] = {
    "calls that are reset": _reset_calls,
    "unfinished messages": _send_unfinished_messages,
    "pings": _ping,
    "settings": _change_settings,
    "empty frames": _send_empty_frames,
    "long headers": _send_long_headers,
    "priorities": _prioritize,
    "continued headers": _continue_headers,
}


async def flood(address: str, burst: Burst, seconds: float) -> int:
    """Send bursts on one connection, and on a new one after the server closes it; return the number of connections."""
    ends_at, connections = time.monotonic() + seconds, 0
    while time.monotonic() < ends_at:
        connections += 1
        with suppress(OSError, AssertionError, TimeoutError, h2.exceptions.ProtocolError):  # the server closed it
            async with Http2Peer.connected(address) as peer:
                reading = asyncio.create_task(peer.closed())
                try:
                    while time.monotonic() < ends_at and not reading.done():
                        await burst(peer, address)
                        await peer.flush()
                        await asyncio.sleep(0)
                finally:
                    reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)
    return connections


async def _flood_on_connections(burst: Burst, address: str) -> None:
    await asyncio.gather(*(flood(address, burst, FLOOD_SECONDS) for _ in range(CONNECTIONS)))


async def _hold_idle_connections(address: str) -> None:
    """Open many connections without calls."""
    async with AsyncExitStack() as stack:
        for _ in range(IDLE_CONNECTIONS):
            await stack.enter_async_context(Http2Peer.connected(address))
        await asyncio.sleep(FLOOD_SECONDS)


async def _hold_silent_connections(address: str) -> None:
    """Open many connections, and send nothing."""
    host, _, port = address.rpartition(":")
    with ExitStack() as stack:
        for _ in range(IDLE_CONNECTIONS):
            _, writer = await asyncio.open_connection(host, int(port))
            stack.callback(writer.close)
        await asyncio.sleep(FLOOD_SECONDS)


async def _check_health(address: str, latencies: list[float]) -> None:
    """Check the health without end, each time on a new connection."""
    while True:
        started_at = time.monotonic()
        # A channel that shares its connection with others would not connect again.
        async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            response = await health_stub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert response.status == SERVING
        latencies.append(time.monotonic() - started_at)
        await asyncio.sleep(0.01)


async def play_floods(scene: Scene) -> None:
    """Floods by raw HTTP/2: clients with a key are served, and memory and file descriptors return."""
    key, entry = new_key("acme")
    keys = scene.folder / "keys.yaml"
    keys.write_text(f"keys:\n  {entry}\n")
    data = scene.folder / "data"
    flags = ("--card", str(fast_card(scene.folder)), "--weights", "demo", "--api-keys-file", str(keys))
    server = await scene.start(data, *flags)
    address, process = server.address, Path(f"/proc/{server.pid}")
    floods: dict[str, Callable[[str], Awaitable[None]]]
    floods = {name: functools.partial(_flood_on_connections, burst) for name, burst in BURSTS.items()}
    floods |= {"idle connections": _hold_idle_connections, "silent connections": _hold_silent_connections}
    latencies: list[float] = []
    async with traffic(address, scene.draw, metadata=[("authorization", f"Bearer {key}")]) as running:
        await running.completed(20)
        memory, files = _memory_bytes(process), _open_files(process)
        for name in scene.draw.sample(sorted(floods), len(floods)):
            replies, checks = len(running.history.completed), len(latencies)
            health = asyncio.create_task(_check_health(address, latencies))
            await floods[name](address)
            failed = health.done() and health.exception()
            health.cancel()
            served = len(running.history.completed) - replies
            scene.check(not failed, f"{name}: the health check failed: {failed!r}")
            scene.check(served > 0 and len(latencies) > checks, f"{name}: no reply or no health check was complete")
        await running.completed(20)
        await _until_closed(scene, process, files + SPARE_FILES)
        growth = _memory_bytes(process) - memory
        scene.check(growth <= MAX_GROWTH_BYTES, f"memory grew by {growth / 1e6:.0f} MB")
    await scene.stop(server)
    scene.check_records(data, running.history)
    scene.check_statuses(running.history)
    replies, slowest = len(running.history.completed), percentile(latencies, 0.99)
    scene.figures.append(
        f"{len(floods)} floods, {replies} replies, health p99 {slowest:.3f} s, memory {growth / 1e6:+.0f} MB"
    )


async def _until_closed(scene: Scene, process: Path, files: int) -> None:
    """Wait until the server has closed the connections of the floods."""
    try:
        async with asyncio.timeout(20):
            while _open_files(process) > files:
                await asyncio.sleep(0.1)
    except TimeoutError:
        scene.broken.append(f"{_open_files(process)} files are open 20 s after the floods, {files} are expected")


def _memory_bytes(process: Path) -> int:
    return int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _open_files(process: Path) -> int:
    return len(list((process / "fd").iterdir()))
