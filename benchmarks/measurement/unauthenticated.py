"""Measure how much memory all clients without an API key can hold together.

Run it with `python -m benchmarks.measurement.unauthenticated`; it serves the demo model in another process, with the
default limits and one API key. Raw connections, as many as the server accepts, then take one step after the other.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from socket import socket

from benchmarks.measurement.overload import running
from benchmarks.measurement.raw_peers import call_headers, connections, message_start, read_all, send
from llama2_server.api.server import MIN_STREAMS
from llama2_server.config.settings import Settings

LIMITS = Settings.model_validate({})
GENERATE = "/llama2.v1.TextGenerationService/Generate"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
PAUSE_SECONDS = 0.25
SAMPLES = 16
GOAL_MEGABYTES = 64


def running_server(folder: Path) -> AbstractContextManager[tuple[int, str]]:
    """Serve with API keys in another process for the body; return the process id and the address."""
    keys = ["--api-keys-file", str(folder / "keys.yaml")]
    server = [sys.executable, "-m", "llama2_server"]
    subprocess.run([*server, "keys", "new", "42", *keys], check=True, capture_output=True)
    options = ["--listen", "127.0.0.1:0", "--data-directory", str(folder), "--log-level", "error", *keys]
    return running([*server, *options])


def megabytes(pid: int) -> float:
    """Return the resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


class Streams:
    """The numbers of new streams, the same on each connection."""

    def __init__(self) -> None:
        self._next = 1

    def calls(self, count: int, path: str, message_bytes: int, sent_bytes: int) -> bytes:
        """Return the frames of calls that have sent a part of their message."""
        numbers = range(self._next, self._next + 2 * count, 2)
        self._next += 2 * count
        calls = (call_headers(number, path) + message_start(number, message_bytes, sent_bytes) for number in numbers)
        return b"".join(calls)


def peak_megabytes(pid: int, peers: Sequence[socket], data: bytes) -> float:
    """Send the data on each connection, and return the largest memory of the process in the next seconds."""
    send(peers, data)
    peak = 0.0
    for _ in range(SAMPLES):
        time.sleep(PAUSE_SECONDS)
        peak = max(peak, megabytes(pid))
        read_all(peers)
    return peak


def main() -> None:
    """Print the growth of the process after each step."""
    streams = Streams()
    calls = MIN_STREAMS - 1
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder)) as (pid, address):
        time.sleep(1)
        before = megabytes(pid)
        with connections(address, LIMITS.max_connections) as peers:
            steps = {
                f"{LIMITS.max_connections} connections": b"",
                "a health watch on each": streams.calls(1, WATCH, 0, 0),
                f"{calls} calls of Generate on each": streams.calls(calls, GENERATE, 1_000_000, 500),
                f"{calls} more, which fill the window": streams.calls(calls, GENERATE, 1_000_000, 60_000 // calls),
                f"{calls} health checks with an unfinished message": streams.calls(calls, CHECK, 1_000_000, 500),
            }
            for name, data in steps.items():
                growth = peak_megabytes(pid, peers, data) - before
                print(f"{name}: {growth:.0f} MB more than before (goal: at most {GOAL_MEGABYTES})")


if __name__ == "__main__":
    main()
