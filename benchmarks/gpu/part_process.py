"""Both ends of the process of a part: an error of the device, or the end of the time limit, ends one part only.

After some errors of a GPU, every further call in the process fails. The results that a part has printed are kept.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

TRACEBACK_CHARACTERS = 2000
RESULT, FAILED, COMPLETE = "result", "failed", "complete"


class PartFailed(Exception):
    """The part has failed or has reached its time limit; the message has the reason."""


def print_results(measure: Callable[[], Iterable[tuple[str, Any]]]) -> None:
    """Print each measured name and result on standard output, as `results_of` reads them.

    Whatever else the process or its children print goes to standard error.
    """
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        try:
            for name, result in measure():
                _print(out, RESULT, name, result)
        except (Exception, SystemExit) as error:  # a server that does not start exits
            # Without this machine's folder, because results are published.
            text = "".join(traceback.format_exception(error)).replace(f"{os.getcwd()}/", "")[-TRACEBACK_CHARACTERS:]
            _print(out, FAILED, "", text)
        else:
            _print(out, COMPLETE, "", None)


def _print(out: IO[str], kind: str, name: str, value: Any) -> None:
    print(json.dumps([kind, name, value]), file=out, flush=True)


def results_of(command: Sequence[str], limit_seconds: float) -> Iterator[tuple[str, Any]]:
    """Run a program that calls `print_results`, and yield each measured name and result at once.

    At the end, the program and all programs that it has started are killed.

    Raises:
        PartFailed: the program has failed, or has not ended after `limit_seconds`.
    """
    ends_at = time.monotonic() + limit_seconds
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        reader = threading.Thread(target=_read_lines, args=(process.stdout, lines))
        reader.start()
        try:
            while True:
                line = lines.get(timeout=max(ends_at - time.monotonic(), 0))
                if line is None:
                    break
                kind, name, value = json.loads(line)
                if kind == COMPLETE:
                    return
                if kind == FAILED:
                    raise PartFailed(value)
                yield name, value
        except queue.Empty:
            raise PartFailed(f"ended at its time limit of {limit_seconds:.0f} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            reader.join()
    raise PartFailed(f"the process ended with status {process.returncode}")


def _read_lines(stream: Iterable[str] | None, lines: "queue.SimpleQueue[str | None]") -> None:
    for line in stream or ():
        lines.put(line)
    lines.put(None)
