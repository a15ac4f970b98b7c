"""Install this project with pip into the virtual environment that runs this module, and report the progress.

    python3 -m tools.install venv .venv     create the environment
    .venv/bin/python -m tools.install server

pip alone is silent for minutes with --quiet, and prints hundreds of lines without it. This prints one line per large
download and one line every few seconds. It needs only the standard library.
"""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

IDLE_TIMEOUT_SECONDS = 3.0
LARGE_MEGABYTES = 20.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Imports what the first start with the demo imports; Python stores the compiled modules.
COMPILE = "import llama2_server.app, llama2_server.cli.main, alembic.command"
PLAN = (
    "installing {extras} into {directory}: about {packages} packages, and the native library in C++. PyTorch "
    "is the largest package: 0.2 GB to download as a CPU build, several GB as a CUDA build, nothing if pip has it in "
    "its cache. Expect one to three minutes from the cache, and longer for downloads."
)
PACKAGES = {"server": 70, "server,dev": 130}
# "Downloading torch-2.13.0-cp311-….whl (190.1 MB)", "Using cached …", or "Collecting numpy>=1 (from …)".
DOWNLOAD = re.compile(r"\s*(Downloading|Using cached) (\S+) \(([\d.]+) (kB|MB|GB)\)")
STEP = re.compile(r"\s*((?:Collecting|Processing|Building|Preparing|Installing|Getting|Obtaining)\b[^:(]*)")
COLLECTED = "Installing collected packages: "
SIZES = {"kB": 1e-3, "MB": 1.0, "GB": 1e3}


class Report:
    """Turns pip's lines into the lines of this program."""

    def __init__(
        self, activity: str = "installing", step: str = "starting pip", now: Callable[[], float] = time.monotonic
    ) -> None:
        self._now = now
        self._started_at = now()
        self._activity = activity
        self._step = step
        self.downloaded_megabytes = 0.0

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return self._now() - self._started_at

    def at(self, step: str) -> "Report":
        """Name the current step; return this report."""
        self._step = step
        return self

    def lines(self, line: str | None) -> Iterator[str]:
        """Yield what to print for a line of pip, or for a few seconds without a printed line (None)."""
        if line is None:
            yield f"still {self._activity}, {self.seconds:.0f} s: {self._step}"
            return
        if download := DOWNLOAD.match(line):
            verb, file, size = download[1], download[2].rpartition("/")[2], float(download[3]) * SIZES[download[4]]
            self._step = f"{verb.lower()} {file}"
            self.downloaded_megabytes += size if verb == "Downloading" else 0
            if size >= LARGE_MEGABYTES:
                yield f"{verb.lower()} {file} ({size:.0f} MB)"
        elif line.startswith(COLLECTED):
            self._step = f"writing {line.count(',') + 1} packages to the disk"
            yield self._step
        elif step := STEP.match(line):
            self._step = step[1].strip()
        elif line.startswith(("ERROR", "error:")):
            yield line


def follow(lines: Iterator[str], report: Report, interval_seconds: float = IDLE_TIMEOUT_SECONDS) -> Iterator[str]:
    """Yield the report of pip's lines, and a line whenever nothing was yielded for `interval_seconds`."""
    inbox: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in lines:
            inbox.put(line.rstrip("\n"))
        inbox.put(None)

    threading.Thread(target=read, daemon=True).start()
    printed_at = time.monotonic()
    while True:
        try:
            line = inbox.get(timeout=max(0.0, printed_at + interval_seconds - time.monotonic()))
        except queue.Empty:
            produced = list(report.lines(None))
        else:
            if line is None:
                return
            produced = list(report.lines(line))
        if produced:
            printed_at = time.monotonic()
            yield from produced


class Children:
    """The program that runs now, in its own session, so that a signal ends it with all that it has started."""

    def __init__(self) -> None:
        self._running: subprocess.Popen[str] | None = None

    def run(self, command: list[str], report: Report) -> tuple[int, str]:
        """Run a program, print the report of its lines, and return its exit code and the last printed line."""
        tail = ""
        # Without this, a signal between the start and the assignment would leave the program running.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_unblock_signals,  # noqa: PLW1509 - no other thread runs here
        ) as child:
            self._running = child
            _unblock_signals()
            assert child.stdout is not None  # noqa: S101 - a pipe, as requested
            for line in follow(iter(child.stdout), report):
                tail = line
                print(line, flush=True)
        self._running = None
        return child.returncode, tail

    def exit(self, number: int, frame: object) -> None:
        """Handle a signal: end the program, print one line, and exit with 128 + number."""
        if self._running is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._running.pid, signal.SIGTERM)
        name = signal.Signals(number).name
        os.write(2, f"installation stopped by {name}; the same command continues it\n".encode())
        os._exit(128 + number)


def create(directory: str, children: Children) -> int:
    """Create a virtual environment; return the exit code."""
    print(f"creating {_short(directory)} with Python {sys.version.split()[0]}, which takes some seconds", flush=True)
    report = Report(f"creating {_short(directory)}", "installing pip")
    code, _ = children.run([sys.executable, "-m", "venv", directory], report)
    if code != 0:
        print(f"{directory}: cannot be created; run {sys.executable} -m venv {directory} for the reason")
    return code


def install(extras: str, children: Children) -> int:
    """Install the project, editable, with these extras; return the exit code."""
    plan = PLAN.format(extras=f"llama2-grpc[{extras}]", directory=_short(sys.prefix), packages=PACKAGES[extras])
    print(plan, flush=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off"]
    # pip compiles every module of every package, which takes longer than all downloads; the server imports a tenth.
    command += ["--no-compile", "--constraint", "constraints.txt", "--editable", f".[{extras}]"]
    report = Report()
    code, tail = children.run(command, report)
    if code == 0:
        code, tail = children.run([sys.executable, "-c", COMPILE], report.at("compiling the modules of the server"))
    if code == 0:
        print(f"installed in {report.seconds:.0f} s; downloaded {report.downloaded_megabytes:.0f} MB", flush=True)
    elif not tail:
        print(f"pip failed with exit code {code}; run it without this program for its output: {command}")
    return code


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _short(path: str) -> str:
    directory = Path(path)
    return str(directory.relative_to(Path.cwd())) if directory.is_relative_to(Path.cwd()) else path


def main() -> None:
    """Run `venv DIRECTORY`, or install the extras of the command line."""
    children = Children()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, children.exit)
    _unblock_signals()  # the Makefile blocks them until the handlers exist
    if sys.argv[1] == "venv":
        sys.exit(create(sys.argv[2], children))
    sys.exit(install(sys.argv[1], children))


if __name__ == "__main__":
    main()
