"""The report of the installation by `make run`, from lines that pip printed."""

import itertools
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.support.repository import ROOT
from tools.install import Report, follow

PIP = """\
Obtaining file:///home/alice/llama2-grpc
  Installing build dependencies: started
  Installing build dependencies: finished with status 'done'
Collecting torch<3,>=2.10 (from llama2-grpc==0.1.0)
  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (915.7 MB)
Collecting click<9,>=8.1 (from llama2-grpc==0.1.0)
  Downloading click-8.3.1-py3-none-any.whl (108 kB)
  Using cached transformers-5.23.0-py3-none-any.whl (21.5 MB)
Installing collected packages: torch, click, transformers
Successfully installed click-8.3.1
""".splitlines()


def test_large_downloads_are_printed() -> None:
    """The lines name each large file with its size, and the sum has the small ones too."""
    report = Report()
    printed = [line for text in PIP for line in report.lines(text)]
    assert printed == [
        "downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (916 MB)",
        "using cached transformers-5.23.0-py3-none-any.whl (22 MB)",
        "writing 3 packages to the disk",
    ]
    assert report.downloaded_megabytes == pytest.approx(915.7 + 0.108)


@pytest.mark.parametrize(
    ("lines_before", "step"),
    [
        (0, "starting pip"),
        (2, "Installing build dependencies"),
        (6, "Collecting click<9,>=8.1"),
        (7, "downloading click-8.3.1-py3-none-any.whl"),
        (9, "writing 3 packages to the disk"),
    ],
)
def test_silence_is_ended_by_the_current_step(lines_before: int, step: str) -> None:
    """A line during a long step has the time so far and the name of the step."""
    clock = itertools.count(0, 10)
    report = Report(now=lambda: next(clock))
    for text in PIP[:lines_before]:
        list(report.lines(text))
    assert list(report.lines(None)) == [f"still installing, 10 s: {step}"]


def test_a_silent_pip_is_reported() -> None:
    """While pip prints nothing, lines appear all the time; they end with pip."""
    reported = threading.Event()

    def silent() -> Iterator[str]:
        yield "Collecting torch<3,>=2.10"
        reported.wait()

    lines = []
    for line in follow(silent(), Report(now=lambda: 0.0), interval_seconds=0.001):
        lines.append(line)
        if len(lines) == 3:
            reported.set()
    assert len(lines) >= 3
    assert all(line.startswith("still installing, 0 s: ") for line in lines[:3])


def test_errors_of_pip_are_printed() -> None:
    """The reason of a failure is a line of pip."""
    assert list(Report().lines("ERROR: No matching distribution found for torch")) == [
        "ERROR: No matching distribution found for torch"
    ]


PROGRAM = """
import sys
from tools import install
install.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_installation_with_one_line(number: signal.Signals, tmp_path: Path) -> None:
    """The program prints one line and exits with 128 + number, and no process of it is left."""
    # In place of venv, a program that has started another one.
    (tmp_path / "venv.py").write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "sys.stdout.write(f'ERROR {child.pid}\\n'); sys.stdout.flush(); child.wait()\n"
    )
    call = [sys.executable, "-c", PROGRAM, "venv", str(tmp_path / "made")]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    pipe = subprocess.PIPE
    with subprocess.Popen(call, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"creating {tmp_path / 'made'} with Python 3.")
        child = int(process.stdout.readline().split()[1])
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (128 + number, "")
    assert errors == f"installation stopped by {number.name}; the same command continues it\n"
    assert wait_until_gone(child)


def wait_until_gone(pid: int) -> bool:
    """Wait for the end of a process that is not a child of this one."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            poll = select.poll()  # select.select accepts only 1,024 descriptors
            poll.register(descriptor, select.POLLIN)
            return bool(poll.poll(30_000))
        finally:
            os.close(descriptor)
    return True
