"""The process of a part of `make bench-gpu`: its results, its errors and its time limit."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks.gpu.part_process import PartFailed, results_of

LIMIT_SECONDS = 3600.0


def results(body: str) -> Iterator[tuple[str, Any]]:
    """Run a part whose generator has this body."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    program = f"import os, subprocess, time\ndef measure():\n{lines}"
    program += "from benchmarks.gpu.part_process import print_results\nprint_results(measure)\n"
    return results_of([sys.executable, "-c", program], LIMIT_SECONDS)


def test_only_results_are_read() -> None:
    """Output of the part or of its children is ignored."""
    body = 'print("noise", flush=True)\nyield "one", 1\nsubprocess.run(["echo", "noise"])\nyield "two", {"a": [2.5]}'
    assert list(results(body)) == [("one", 1), ("two", {"a": [2.5]})]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ('raise RuntimeError("no device")', r"Traceback[\s\S]*RuntimeError: no device\n$"),
        ('raise SystemExit("the server did not start")', "SystemExit: the server did not start"),
        ("os._exit(3)", "^the process ended with status 3$"),
        ("os.abort()", "^the process ended with status -6$"),
    ],
)
def test_a_part_that_fails(error: str, message: str) -> None:
    """The results before the error are kept, also if the process crashes."""
    found = results(f'yield "one", 1\n{error}')
    assert next(found) == ("one", 1)
    with pytest.raises(PartFailed, match=message):
        next(found)


def test_a_part_ends_at_its_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process and the programs that it has started are killed; the results until then are kept."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    alive = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    body = f'pipe = os.open("{fifo}", os.O_WRONLY)\nsubprocess.Popen(["sleep", "3600"], pass_fds=[pipe])\n'
    found = results(body + 'yield "one", 1\ntime.sleep(3600)')
    assert next(found) == ("one", 1)
    monkeypatch.setattr("benchmarks.gpu.part_process.time", SimpleNamespace(monotonic=lambda: float("inf")))
    with pytest.raises(PartFailed, match="ended at its time limit of 3600 s"):
        next(found)
    os.set_blocking(alive, True)
    assert os.read(alive, 1) == b""  # waits until no process has the pipe
    os.close(alive)
