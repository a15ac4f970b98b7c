"""An HTTP/2 server that sends what a case's script says, including what no gRPC library sends."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
from google.protobuf.json_format import MessageToDict, Parse
from google.rpc import status_pb2

from conformance.v1 import conformance_pb2 as pb
from llama2.v1 import text_generation_pb2


@dataclass(slots=True)
class ReceivedCall:
    """A call as the server received it."""

    headers: dict[str, str]
    body: bytes = b""
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def request(self) -> text_generation_pb2.GenerateRequest:
        """The request message."""
        return text_generation_pb2.GenerateRequest.FromString(self.body[5:])


class ScriptedServer:
    """Plays one script per call. `play` replaces the scripts before each case."""

    def __init__(self) -> None:
        self.calls: list[ReceivedCall] = []
        self._scripts: list[pb.Script] = []
        self._connections: set[_Connection] = set()

    def play(self, scripts: list[pb.Script]) -> None:
        """Use these scripts for the following calls; the last one serves all later calls."""
        self.calls, self._scripts = [], list(scripts)

    def next_script(self) -> pb.Script:
        """Return the script of the next call."""
        return self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        connection = _Connection(self, reader, writer)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)

    def close_connections(self) -> None:
        """Close all connections."""
        for connection in self._connections:
            connection.close()


class _Http2(h2.connection.H2Connection):
    """Continues the running streams after a client's GOAWAY; h2 would close the connection."""

    def _receive_goaway_frame(self, frame: Any) -> tuple[list[Any], list[Any]]:
        return [], []


class _Connection:
    def __init__(self, server: ScriptedServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server, self._reader, self._writer = server, reader, writer
        self._http2 = _Http2(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self._calls: dict[int, ReceivedCall] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._window = asyncio.Event()

    async def run(self) -> None:
        self._http2.initiate_connection()
        await self._flush()
        try:
            while data := await self._reader.read(65536):
                for event in self._http2.receive_data(data):
                    self._handle(event)
                await self._flush()
        except (OSError, h2.exceptions.ProtocolError):
            pass
        finally:
            for call in self._calls.values():
                call.cancelled.set()
            self.close()
            for task in self._tasks:
                task.cancel()

    def close(self) -> None:
        self._writer.close()

    async def _flush(self) -> None:
        self._writer.write(self._http2.data_to_send())
        with contextlib.suppress(OSError):
            await self._writer.drain()

    def _handle(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived(stream_id=stream, headers=headers) if stream is not None:
                self._calls[stream] = ReceivedCall({str(key): str(value) for key, value in headers or ()})
            case h2.events.DataReceived(stream_id=stream, data=data, flow_controlled_length=length):
                if stream is not None:
                    self._calls[stream].body += data or b""
                    self._http2.acknowledge_received_data(length or 0, stream)
            case h2.events.StreamEnded(stream_id=stream) if stream is not None:
                self._server.calls.append(self._calls[stream])
                task = asyncio.create_task(self._play(stream, self._server.next_script()))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case h2.events.StreamReset(stream_id=stream) if stream in self._calls:
                self._calls[stream].cancelled.set()
            case h2.events.WindowUpdated():
                self._window.set()
            case _:
                pass

    async def _play(self, stream: int, script: pb.Script) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError, OSError, KeyError):
            first = script.parts[0].WhichOneof("kind") if script.parts else "end"
            started = first not in {"reset", "close", "end", "wait_for_cancel"}
            if started:
                self._http2.send_headers(stream, [(":status", "200"), ("content-type", "application/grpc")])
            for part in script.parts:
                await self._play_part(stream, part, started)
                await self._flush()

    async def _play_part(self, stream: int, part: pb.Part, started: bool) -> None:
        match part.WhichOneof("kind"):
            case "message":
                await self._send(stream, part.message.SerializeToString())
            case "hex":
                await self._send(stream, bytes.fromhex(part.hex))
            case "many":
                data = text_generation_pb2.GenerateStreamResponse(response=".").SerializeToString()
                for _ in range(part.many):
                    await self._send(stream, data)
            case "end":
                self._http2.send_headers(stream, trailers(part.end, started), end_stream=True)
            case "wait_ms":
                await asyncio.sleep(part.wait_ms / 1000)
            case "wait_for_cancel":
                await self._calls[stream].cancelled.wait()
            case _:
                await self._disturb(stream, part)

    async def _disturb(self, stream: int, part: pb.Part) -> None:
        await self._flush()
        match part.WhichOneof("kind"):
            case "goaway":
                # h2 would reject the frames after its own GOAWAY: last stream and NO_ERROR by hand.
                self._writer.write(b"\x00\x00\x08\x07\x00" + b"\x00" * 4 + stream.to_bytes(4) + b"\x00" * 4)
            case "reset":
                self._http2.reset_stream(stream, h2.errors.ErrorCodes(part.reset))
            case "close":
                self.close()
            case _:
                pass

    async def _send(self, stream: int, message: bytes) -> None:
        data = b"\x00" + len(message).to_bytes(4) + message
        while data:
            size = min(self._http2.local_flow_control_window(stream), self._http2.max_outbound_frame_size, len(data))
            if size == 0:
                self._window.clear()
                await self._window.wait()
                continue
            self._http2.send_data(stream, data[:size])
            data = data[size:]
            await self._flush()


def trailers(end: pb.End, started: bool) -> list[tuple[str, str]]:
    """Return the headers that end a call; without earlier headers they are the only ones."""
    found = [] if started else [(":status", "200"), ("content-type", "application/grpc")]
    found += [("grpc-status", str(end.code)), ("grpc-message", quote(end.message))]
    details = bytes.fromhex(end.details_hex)
    if end.details:
        text = json.dumps(
            {"code": end.code, "message": end.message, "details": [MessageToDict(one) for one in end.details]}
        )
        details = Parse(text, status_pb2.Status()).SerializeToString()
    if details:
        found.append(("grpc-status-details-bin", base64.b64encode(details).decode().rstrip("=")))
    if end.pushback:
        found.append(("grpc-retry-pushback-ms", end.pushback))
    return found


@asynccontextmanager
async def running_scripted_server() -> AsyncIterator[tuple[ScriptedServer, str]]:
    """Serve on a free loopback port, and yield the server and its address."""
    scripted = ScriptedServer()
    server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    try:
        yield scripted, f"{host}:{port}"
    finally:
        server.close()
        scripted.close_connections()
