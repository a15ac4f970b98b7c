"""Servers that are forks of one process with all imports: real processes that start in a fraction of a second."""

import json
import os
import re
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from tests.support.processes import command, environment


class Forks:
    """The process that forks servers; `running` starts it."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._lock = threading.Lock()
        """Held from a request to its answer: two threads can start and wait at the same time."""
        self.log = folder / "server.log"
        """The log of all servers."""

    @classmethod
    @contextmanager
    def running(cls, folder: Path) -> Iterator[Self]:
        """Run it for the body; then kill the servers that still run."""
        line = [*command(module="tests.support.programs.forking_process")]
        variables = environment(GRPC_VERBOSITY="NONE")
        pipe = subprocess.PIPE
        with subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, env=variables) as process:
            yield cls(process, folder)
            # The end of its input ends it.

    def start(
        self,
        data_directory: Path,
        *flags: str,
        commit_seconds: float = 0,
        step_seconds: float = 0,
        charges: Path | None = None,
    ) -> "ForkedServer":
        """Start a server on a free port, and return when it serves.

        Args:
            data_directory: its data directory.
            flags: further flags; a second `--listen` counts.
            commit_seconds: time by which each commit of the usage database is delayed.
            step_seconds: time by which each decode step is delayed.
            charges: file that gets a line for each quota unit that the server consumes or gives back.
        """
        arguments = ["--listen", "127.0.0.1:0", "--data-directory", str(data_directory)]
        arguments += ["--log-level", "warning", *flags]
        pipe = self._folder / f"stdout-{uuid.uuid4().hex}"
        os.mkfifo(pipe)
        paths = {"stdout": str(pipe), "stderr": str(self.log)}
        delays = {"commit_seconds": commit_seconds, "step_seconds": step_seconds}
        log = {"charges": None if charges is None else str(charges)}
        pid = self._answer({"flags": arguments, **delays, **paths, **log})
        output = pipe.open()
        pipe.unlink()
        serving = re.match(r"SERVING on (\S+)\.", output.readline())
        if serving is None:
            output.close()
            raise AssertionError(self.log.read_text())
        return ForkedServer(self, pid, serving[1], output)

    def wait(self, pid: int) -> int:
        """Wait for the end of a server, and return its exit code."""
        return self._answer({"wait": pid})

    def _answer(self, request: dict[str, object]) -> int:
        assert self._process.stdin
        assert self._process.stdout
        with self._lock:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            return int(self._process.stdout.readline())


@dataclass(frozen=True)
class ForkedServer:
    """A server process."""

    forks: Forks
    pid: int
    address: str
    output: IO[str]

    def kill(self) -> None:
        """Send SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end, and return its exit code."""
        with self.output:
            self.output.read()  # a closed pipe would fail a server that still writes
        return self.forks.wait(self.pid)

    def stop(self) -> int:
        """Send SIGTERM, wait for its end, and return its exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()
