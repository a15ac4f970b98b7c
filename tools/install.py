"""Install this project with pip into the virtual environment that runs this module, and report the progress.

    python -m tools.install server

pip alone is silent for minutes with --quiet, and prints hundreds of lines without it. This prints one line per large
download and one line every few seconds. It needs only the standard library.
"""

import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

IDLE_TIMEOUT_SECONDS = 4.0
LARGE_MEGABYTES = 20.0
EXIT_INTERRUPTED = 130
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

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._started_at = now()
        self._step = "starting pip"
        self.downloaded_megabytes = 0.0

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return self._now() - self._started_at

    def lines(self, line: str | None) -> Iterator[str]:
        """Yield what to print for a line of pip, or for a few seconds without a printed line (None)."""
        if line is None:
            yield f"still installing, {self.seconds:.0f} s: {self._step}"
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


def install(extras: str) -> int:
    """Install the project, editable, with these extras; return pip's exit code."""
    print(PLAN.format(extras=f"llama2-grpc[{extras}]", directory=_short(sys.prefix), packages=PACKAGES[extras]))
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off"]
    command += ["--constraint", "constraints.txt", "--editable", f".[{extras}]"]
    report, tail = Report(), ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        assert pip.stdout is not None  # noqa: S101 - a pipe, as requested
        for line in follow(iter(pip.stdout), report):
            tail = line
            print(line, flush=True)
    if pip.returncode == 0:
        print(f"installed in {report.seconds:.0f} s; downloaded {report.downloaded_megabytes:.0f} MB", flush=True)
    elif not tail:
        print(f"pip failed with exit code {pip.returncode}; run it without this program for its output: {command}")
    return pip.returncode


def _short(path: str) -> str:
    directory = Path(path)
    return str(directory.relative_to(Path.cwd())) if directory.is_relative_to(Path.cwd()) else path


def main() -> None:
    """Install the extras of the command line."""
    try:
        sys.exit(install(sys.argv[1]))
    except KeyboardInterrupt:
        sys.stderr.write("installation stopped by SIGINT; make run continues it\n")
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
