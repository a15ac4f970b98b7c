"""A real Redis for tests: redis-server on a free loopback port, that can be killed, frozen and started again."""

import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class RedisServer:
    """One redis-server process; nothing of it outlives the test."""

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
        """Start on the port of before; returns once it answers."""
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
        said = []
        for line in self._process.stdout:
            said.append(line.decode())
            if b"Ready to accept connections" in line:
                return
        raise RuntimeError("redis-server did not start:\n" + "".join(said))

    def freeze(self) -> None:
        """Stop answering, with every connection left open."""
        self._running.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Answer again."""
        self._running.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once, as a crash would; what it held is lost."""
        process = self._running
        process.kill()
        process.communicate()
        self._process = None

    def close(self) -> None:
        """End it if it runs."""
        if self._process is not None:
            self.kill()

    @property
    def _running(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, "redis-server does not run"
        return self._process


@contextmanager
def running_redis(folder: Path, password: str | None = None) -> Iterator[RedisServer]:
    """A Redis for the body of the `with`; where there is none the test is skipped, and says so."""
    pytest.importorskip("redis", reason="NOT TESTED WITH REDIS: the redis extra is not installed")
    if shutil.which("redis-server") is None:
        pytest.skip("NOT TESTED WITH REDIS: redis-server is not installed (Debian: apt-get install redis-server)")
    server = RedisServer(folder, password)
    try:
        server.start()
        yield server
    finally:
        server.close()
