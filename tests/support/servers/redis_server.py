"""A real Redis for tests: redis-server on a free loopback port; tests can kill, freeze and restart it."""

import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class RedisServer:
    """One redis-server process, which ends with the test."""

    def __init__(self, folder: Path, password: str | None = None) -> None:
        self._folder = folder
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port: int = free.getsockname()[1]

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        """The address as a Redis URL."""
        return f"redis://{self.address}" if self._password is None else f"redis://:{self._password}@{self.address}"

    def start(self) -> None:
        """Start on the same port each time, and return when Redis accepts connections."""
        options = {
            "port": str(self._port),
            "bind": "127.0.0.1",
            "dir": str(self._folder),
            "save": "",
            "daemonize": "no",
        }
        if self._password is not None:
            options["requirepass"] = self._password
        command = ["redis-server", *(word for key, value in options.items() for word in (f"--{key}", value))]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert self._process.stdout is not None
        output = []
        for line in self._process.stdout:
            output.append(line.decode())
            if b"Ready to accept connections" in line:
                return
        raise RuntimeError("redis-server did not start:\n" + "".join(output))

    def freeze(self) -> None:
        """Stop answering, but leave every connection open."""
        self._running.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Answer again."""
        self._running.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the process like a crash; its data is lost."""
        process = self._running
        process.kill()
        process.communicate()
        self._process = None

    def close(self) -> None:
        """Kill the process if it runs."""
        if self._process is not None:
            self.kill()

    @property
    def _running(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, "redis-server is not running"
        return self._process


@contextmanager
def running_redis(folder: Path, password: str | None = None) -> Iterator[RedisServer]:
    """Run a Redis for the body of the `with`; skip the test, with the reason, if Redis is not installed."""
    pytest.importorskip("redis", reason="NOT TESTED WITH REDIS: the redis extra is not installed")
    if shutil.which("redis-server") is None:
        pytest.skip("NOT TESTED WITH REDIS: redis-server is not installed (Debian: apt-get install redis-server)")
    server = RedisServer(folder, password)
    try:
        server.start()
        yield server
    finally:
        server.close()
