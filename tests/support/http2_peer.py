"""An HTTP/2 client without gRPC, which can violate the protocol in ways that gRPC clients cannot."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Self, TypeVar

import h2.config
import h2.connection
import h2.events
import h2.settings

Event = TypeVar("Event", bound=h2.events.Event)


class Http2Peer:
    """A connection. Each action of the server is an event."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        config = h2.config.H2Configuration(client_side=True, header_encoding="utf-8", validate_outbound_headers=False)
        self.http2 = h2.connection.H2Connection(config)
        self.silent = False
        """Whether the peer answers nothing more, not even pings."""
        self._reader, self._writer = reader, writer
        self._events: list[h2.events.Event] = []

    @classmethod
    @asynccontextmanager
    async def connected(cls, address: str, *, with_call: bool = False) -> AsyncIterator[Self]:
        """Connect, and exchange the settings; if asked, the first packet also starts a call."""
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        peer = cls(reader, writer)
        try:
            peer.http2.initiate_connection()
            if with_call:
                peer.send_call_headers(address)
            # A gRPC server enforces a limit only after the peer has received it.
            await peer.flush()
            await peer.event(h2.events.RemoteSettingsChanged)
            yield peer
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def flush(self) -> None:
        """Send all pending data."""
        self._writer.write(self.http2.data_to_send())
        with suppress(OSError):
            await self._writer.drain()

    def send_bytes(self, data: bytes) -> None:
        """Send bytes that may violate the protocol, after all pending data."""
        self._writer.write(self.http2.data_to_send() + data)

    async def start_call(self, address: str, *metadata: tuple[str, str], service: str = "", method: str = "") -> int:
        """Send the headers of a call without its request, and return the number of its stream."""
        stream = self.send_call_headers(address, *metadata, service=service, method=method)
        await self.flush()
        return stream

    def send_call_headers(self, address: str, *metadata: tuple[str, str], service: str = "", method: str = "") -> int:
        """Add the headers of a call to the pending data, and return the number of its stream."""
        stream = self.http2.get_next_available_stream_id()
        path = f"/{service or 'llama2.v1.TextGenerationService'}/{method or 'CountTokens'}"
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", address),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *metadata,
        ]
        self.http2.send_headers(stream, headers)
        return stream

    async def event(self, kind: type[Event], timeout_seconds: float = 60) -> Event:
        """Return the next event of a kind, received or to come; fail if the server closes the connection first."""
        async with asyncio.timeout(timeout_seconds):
            while True:
                for event in self._events:
                    if isinstance(event, kind):
                        self._events.remove(event)
                        return event
                assert await self._read(), f"closed before {kind.__name__}; events: {self._events}"

    async def closed(self, timeout_seconds: float = 60) -> None:
        """Wait until the server closes the connection."""
        async with asyncio.timeout(timeout_seconds):
            while await self._read():
                pass

    def setting(self, code: h2.settings.SettingCodes) -> Any:
        """Return a setting of the server."""
        return self.http2.remote_settings[code]

    async def _read(self) -> bool:
        try:
            data = await self._reader.read(65536)
        except OSError:
            return False
        if not data:
            return False
        if not self.silent:
            self._events += self.http2.receive_data(data)
            await self.flush()
        return True


async def wait_until_closed(reader: asyncio.StreamReader) -> None:
    """Wait until the server closes a connection."""
    async with asyncio.timeout(60):
        with suppress(OSError):
            while await reader.read(4096):
                pass
