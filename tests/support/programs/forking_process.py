"""A process that forks servers, so that each of them serves within a fraction of a second.

It reads lines of JSON: a `Fork` starts a server, `{"wait": PID}` waits for the end of one. It answers each line with a
number, the server's PID or exit code. At the end of its input it kills the servers that still run.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypedDict

import transformers.models.llama  # noqa: F401 - reads checkpoints; the server imports it late

from llama2_server import app  # noqa: F401 - the server imports it late
from llama2_server.admission.quota import Quota, QuotaUnit
from llama2_server.cli.main import main
from llama2_server.engine.step_planner import Step
from llama2_server.engine.step_runner import NativeStepRunner
from llama2_server.usage.local.database import Database


class Fork(TypedDict):
    """A server to start."""

    flags: list[str]
    stdout: str
    """Path of a named pipe that receives its output."""
    stderr: str
    """Path of a file to which its log is appended."""
    commit_seconds: float
    """Time by which each commit of the usage database is delayed."""
    step_seconds: float
    """Time by which each decode step is delayed."""
    charges: str | None
    """Path of a file that gets a line for each consumed quota unit, `+1 ACCOUNT`, and for each refund, `-1 ACCOUNT`."""


def serve(fork: Fork) -> NoReturn:
    """Become the server."""
    for path, descriptor, flags in (("/dev/null", 0, os.O_RDONLY), (fork["stdout"], 1, os.O_WRONLY)):
        os.dup2(os.open(path, flags), descriptor)
    os.dup2(os.open(fork["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    if fork["commit_seconds"]:
        _delay_commits(fork["commit_seconds"])
    if fork["step_seconds"]:
        _delay_steps(fork["step_seconds"])
    if fork["charges"]:
        _log_charges(fork["charges"])
    sys.argv = ["llama2-server", *fork["flags"]]
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    finally:
        os._exit(1)


def _delay_commits(seconds: float) -> None:
    transaction = Database.transaction

    @contextmanager
    def delayed(database: Database, *, writes: bool = True) -> Iterator[Any]:
        with transaction(database, writes=writes) as connection:
            yield connection
            time.sleep(seconds if writes else 0)

    Database.transaction = delayed  # type: ignore[method-assign, assignment]


def _delay_steps(seconds: float) -> None:
    run = NativeStepRunner.run

    def delayed(runner: NativeStepRunner, step: Step) -> Any:
        time.sleep(seconds if step.decoding else 0)
        return run(runner, step)

    NativeStepRunner.run = delayed  # type: ignore[method-assign, assignment]


def _log_charges(path: str) -> None:
    consume, refund = Quota.consume, Quota.refund
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    async def consumed(quota: Quota, account_id: str) -> QuotaUnit:
        unit = await consume(quota, account_id)
        os.write(log, f"+1 {account_id}\n".encode())
        return unit

    async def refunded(quota: Quota, unit: QuotaUnit) -> None:
        os.write(log, f"-1 {unit.account_id}\n".encode())
        await refund(quota, unit)

    Quota.consume, Quota.refund = consumed, refunded  # type: ignore[method-assign, assignment]


def fork_servers() -> None:
    """Serve the lines of the standard input."""
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            running.remove(request["wait"])
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                serve(request)
            running.add(answer)
        print(answer, flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    fork_servers()
