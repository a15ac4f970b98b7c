"""Contenders as the benchmark sees them: another process that continues prompts and says how long it took."""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import IO, Any, Protocol, Self

from benchmarks.prompts import Prompt
from benchmarks.workers.protocol import Generated, Setup


class NotRun(Exception):
    """A contender cannot take part here; the message says why."""


@dataclass(frozen=True)
class Run:
    """One generation of all prompts together."""

    output_tokens: int  # of all replies
    first_seconds: float  # until every reply had begun
    total_seconds: float
    token_ids: list[list[int]] | None = None
    texts: list[str] | None = None


class Contender(Protocol):
    """Something that continues prompts."""

    @property
    def process_id(self) -> int:
        """The process that computes, or from which those descend that do."""

    def generate(self, prompts: list[Prompt], tokens: int) -> Run:
        """Continue prompts of one length by so many tokens each, all at once, greedily."""

    def about(self) -> dict[str, Any]:
        """Its arithmetic, and the versions of what it runs on."""

    def close(self) -> None:
        """End its processes."""


class Worker:
    """A contender that speaks `workers.protocol`."""

    def __init__(self, module: str, setup: Setup, python: str = sys.executable) -> None:
        """Start it; `ready` waits until it has loaded."""
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in close
        command = [python, "-m", f"benchmarks.workers.{module}"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self._about: dict[str, Any] = {}
        self._say(asdict(setup))

    def ready(self) -> Self:
        """Wait until it can be asked; raises NotRun if it cannot load."""
        self._about = self._hear()
        return self

    @property
    def process_id(self) -> int:
        """The worker's."""
        return self._process.pid

    def about(self) -> dict[str, Any]:
        """Its arithmetic, and the versions of what it runs on."""
        return self._about

    def generate(self, prompts: list[Prompt], tokens: int) -> Run:
        """As `Contender` says."""
        answer = self.ask("generate", prompts=[prompt.token_ids for prompt in prompts], tokens=tokens)
        generated = Generated(**answer)
        if any(len(reply) != tokens for reply in generated.token_ids):
            raise NotRun(f"{[len(reply) for reply in generated.token_ids]} tokens came, {tokens} were asked for")
        return Run(len(prompts) * tokens, generated.first_seconds, generated.total_seconds, generated.token_ids)

    def ask(self, method: str, **arguments: Any) -> Any:
        """What a method of the worker answers; raises NotRun if it ends instead."""
        self._say({"method": method, **arguments})
        return self._hear()

    def close(self) -> None:
        """End the process."""
        _pipe(self._process.stdin).close()
        self._process.kill()
        self._process.wait()
        _pipe(self._process.stdout).close()
        self._log.close()

    def _say(self, content: dict[str, Any]) -> None:
        try:
            _pipe(self._process.stdin).write(json.dumps(content) + "\n")
            _pipe(self._process.stdin).flush()
        except BrokenPipeError as error:
            raise NotRun(self._last_words()) from error

    def _hear(self) -> Any:
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise NotRun(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else f"exit code {self._process.returncode}"


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise TypeError("the process was started without this pipe")
    return pipe
