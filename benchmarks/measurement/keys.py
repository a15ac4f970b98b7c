"""Measure what 10,000 API keys cost: the time that they add to a start, and how long a reload holds the event loop.

Run it with `python -m benchmarks.measurement.keys`; it serves the demo model in other processes.
"""

import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.measurement.overload import HOLDS, KEYS, running_server
from llama2_server.admission.accounts import ApiKeyAuthenticator
from llama2_server.admission.keys.keys_file import new_key

MANY_KEYS = 10_000
STARTS = 5
RELOADS = 5
POLL_SECONDS = 0.05
RELOAD_SECONDS = 120
"""Time limit of a reload."""


def write_keys(path: Path, count: int) -> None:
    """Write a file with new keys, and put it in place of the old one in one step."""
    entries = "".join(f"  {new_key(f'account{number}')[1]}\n" for number in range(count))
    new = path.with_suffix(".new")
    new.write_text(f"keys:\n{entries}", encoding="utf-8")
    new.replace(path)


def read_seconds(path: Path) -> float:
    """Return the CPU time in which a start reads a keys file."""
    started_at = time.process_time()
    ApiKeyAuthenticator(path)
    return time.process_time() - started_at


def hold_milliseconds(folder: Path, pid: int, log: Path) -> float:
    """Replace the keys file of a server, and return its longest hold of the event loop until it has read the file."""
    read = log.read_text(encoding="utf-8").count(f"read {MANY_KEYS} API keys")
    os.kill(pid, signal.SIGUSR1)
    write_keys(folder / KEYS, MANY_KEYS)
    ends_at = time.monotonic() + RELOAD_SECONDS
    while log.read_text(encoding="utf-8").count(f"read {MANY_KEYS} API keys") == read:
        if time.monotonic() > ends_at:
            raise TimeoutError(f"the server has not read the keys in {RELOAD_SECONDS} s")
        time.sleep(POLL_SECONDS)
    return float((folder / HOLDS).read_text())


def main() -> None:
    """Print both figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in (1, MANY_KEYS):
            write_keys(folder / KEYS, count)
            seconds = statistics.median(read_seconds(folder / KEYS) for _ in range(STARTS))
            print(f"{count} keys: a start reads them in {seconds:.2f} s of CPU time (goal for {MANY_KEYS}: under 1)")
        (folder / HOLDS).touch()
        log = folder / "log"
        with log.open("w") as stream, running_server(folder, stream) as (pid, _):
            holds = [hold_milliseconds(folder, pid, log) for _ in range(RELOADS)]
        print(f"a reload of {MANY_KEYS} keys holds the event loop for {max(holds):.1f} ms at most (goal: 10)")


if __name__ == "__main__":
    main()
