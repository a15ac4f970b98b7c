"""A TCP proxy that breaks its connections when a test asks for it, as a lost network does."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

CHUNK_BYTES = 65536
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing the socket resets the connection, and what was not sent is lost."""


class CuttingProxy:
    """Forwards connections on a loopback port to the address that `target` returns."""

    def __init__(self, target: Callable[[], str]) -> None:
        self._target = target
        self._writers: dict[asyncio.StreamWriter, None] = {}
        self.address = ""
        self.connections = 0
        """Connections that clients have opened so far."""

    @classmethod
    @asynccontextmanager
    async def running(cls, target: Callable[[], str]) -> AsyncIterator["CuttingProxy"]:
        """Serve for the body, on a free port."""
        proxy = cls(target)
        server = await asyncio.start_server(proxy._connect, "127.0.0.1", 0)
        proxy.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield proxy
        finally:
            server.close()
            proxy.cut()
            await server.wait_closed()

    def cut(self) -> None:
        """Reset all connections, on both sides."""
        for writer in list(self._writers):
            self._reset(writer)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers[writer] = None
        other: asyncio.StreamWriter | None = None
        try:
            host, _, port = self._target().rpartition(":")
            server_reader, other = await asyncio.open_connection(host, int(port))
            self._writers[other] = None
            await asyncio.gather(self._copy(reader, other), self._copy(server_reader, writer))
        except OSError:  # one side is gone
            pass
        finally:
            for one in (writer, other):
                if one is not None:
                    self._reset(one)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError  # no half of a connection stays open

    def _reset(self, writer: asyncio.StreamWriter) -> None:
        self._writers.pop(writer, None)
        with contextlib.suppress(OSError):  # closed
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.transport.abort()
