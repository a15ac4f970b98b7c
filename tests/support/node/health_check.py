"""The RPC of a gRPC probe as a command: `python -I -S health_check.py PORT SERVICE`, with exit code 0 while it serves.

Kubernetes 1.20 has no gRPC probes. The client's health command would import its libraries in each pod every few
seconds. On a busy machine, its start exceeds the probe's timeout, and the kubelet restarts the server.
"""

import socket
import sys

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4
SERVING = b"\0\0\0\0\x02\x08\x01"  # a message of two bytes: field 1 is 1


def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    """Return an HTTP/2 frame."""
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content


def text(value: bytes) -> bytes:
    """Return a string with its length in one byte, as HPACK and protobuf write it."""
    return bytes([len(value)]) + value


def request(service: bytes) -> bytes:
    """Return a connection's first bytes, with a call of grpc.health.v1.Health/Check."""
    fields = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/grpc.health.v1.Health/Check",
        b":authority": b"localhost",
        b"content-type": b"application/grpc",
        b"te": b"trailers",
    }
    headers = b"".join(b"\0" + text(name) + text(value) for name, value in fields.items())
    message = b"\n" + text(service) if service else b""
    content = b"\0" + len(message).to_bytes(4, "big") + message
    return (
        PREFACE
        + frame(SETTINGS, 0, 0, b"")
        + frame(HEADERS, END_HEADERS, 1, headers)
        + frame(DATA, END_STREAM, 1, content)
    )


def main() -> int:
    """Return 0 if the service at the port serves, 1 if it does not."""
    port, service = sys.argv[1:]
    with socket.create_connection(("127.0.0.1", int(port)), timeout=5) as connection:
        connection.sendall(request(service.encode()))
        received = b""
        while SERVING not in received:
            chunk = connection.recv(65536)
            received += chunk
            if not chunk or b"grpc-status" in received or received.count(b"\0\0\0\0\x02\x08"):
                break
    return SERVING not in received


if __name__ == "__main__":
    sys.exit(main())
