"""Servers as processes of their own."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


def command(*flags: str, module: str = "llama2_server") -> list[str]:
    """How a server is started."""
    return [sys.executable, "-m", module, *flags]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without settings of the developer's own."""
    return {key: value for key, value in os.environ.items() if not key.startswith("LLAMA2_")} | extra


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback that nobody listened on a moment ago."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]


@contextmanager
def server(
    data_directory: Path, *flags: str, listen: str = "127.0.0.1:0"
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process, on a free port unless told otherwise, and its address."""
    log = data_directory / "server.log"
    with (
        log.open("a") as errors,
        subprocess.Popen(
            command("--listen", listen, "--data-directory", str(data_directory), *flags),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment(),
        ) as process,
    ):
        assert process.stdout is not None
        serving = re.match(r"SERVING on (\S+)\.", process.stdout.readline())
        assert serving, log.read_text()
        try:
            yield process, serving[1]
        finally:
            process.kill()
