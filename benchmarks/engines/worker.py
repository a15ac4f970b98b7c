"""An engine under test that runs as a worker process and is called through `workers.protocol`."""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from typing import IO, Any, Self

from benchmarks.engines.under_test import SkippedPeer, TimedRun
from benchmarks.prompts import Prompt
from benchmarks.workers.protocol import Generated, Setup


class Worker:
    """A worker process; its methods raise SkippedPeer if the process ends."""

    def __init__(self, module: str, setup: Setup, python: str = sys.executable) -> None:
        """Start the process without waiting until it has loaded; `ready` waits."""
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in close
        command = [python, "-m", f"benchmarks.workers.{module}"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self._description: dict[str, Any] = {}
        self._send(asdict(setup))

    def ready(self) -> Self:
        """Wait until the worker has loaded its model."""
        self._description = self._receive()
        return self

    @property
    def process_id(self) -> int:
        """The id of the worker process."""
        return self._process.pid

    def describe(self) -> dict[str, Any]:
        """Return its arithmetic and the versions of its libraries."""
        return self._description

    def generate(self, prompts: list[Prompt], tokens: int, seed: int | None) -> TimedRun:
        """Continue prompts of equal length, all at once, by `tokens` tokens each; without a seed greedily."""
        response = self.call("generate", prompts=[prompt.token_ids for prompt in prompts], tokens=tokens, seed=seed)
        generated = Generated(**response)
        lengths = [len(reply) for reply in generated.token_ids]
        if any(length != tokens for length in lengths):
            raise SkippedPeer(f"it generated {lengths} tokens instead of {tokens} per reply")
        return TimedRun(
            len(prompts) * tokens, generated.first_token_seconds, generated.total_seconds, generated.token_ids
        )

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of the worker and return its result."""
        self._send({"method": method, **arguments})
        return self._receive()

    def close(self) -> None:
        """Stop the process."""
        _pipe(self._process.stdin).close()
        self._process.kill()
        self._process.wait()
        _pipe(self._process.stdout).close()
        self._log.close()

    def _send(self, content: dict[str, Any]) -> None:
        try:
            _pipe(self._process.stdin).write(json.dumps(content) + "\n")
            _pipe(self._process.stdin).flush()
        except BrokenPipeError as error:
            raise SkippedPeer(self._last_log_line()) from error

    def _receive(self) -> Any:
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise SkippedPeer(self._last_log_line())
        return json.loads(line)

    def _last_log_line(self) -> str:
        self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else f"exit code {self._process.returncode}"


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise TypeError("the process was started without this pipe")
    return pipe
