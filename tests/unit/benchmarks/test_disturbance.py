"""Detection of other load on the machine, and repetition of disturbed measurements."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from benchmarks.measurement.cpu_usage import TICKS_PER_SECOND, foreign_cpu_share, process_tree_ticks
from benchmarks.measurement.disturbance import MAX_ATTEMPTS, Measurement, measure_undisturbed

BUSY_SECONDS = 0.5
BUSY = f"import time\nwhile time.process_time() < {BUSY_SECONDS}: pass"
needs_proc = pytest.mark.skipif(
    not Path("/proc/stat").exists(), reason="NOT TESTED: only Linux reports the CPU time of other processes"
)


def no_pause(seconds: float) -> None:
    pytest.fail(f"a pause of {seconds} seconds")


class FakeWatch:
    """A fake of `foreign_cpu_share` that returns the given shares in turn and counts the attempts."""

    def __init__(self, *shares: float | None) -> None:
        self.shares: Iterator[float | None] = iter(shares)
        self.attempts = 0

    def __call__(self, measure: Callable[[], Measurement]) -> tuple[Measurement, float | None]:
        self.attempts += 1
        return measure(), next(self.shares)


def test_undisturbed_measurement_is_kept() -> None:
    """The first attempt counts."""
    watch = FakeWatch(0.01)
    measurement = measure_undisturbed(lambda: {"seconds": 1.0}, watch=watch, pause=no_pause)
    assert measurement == {"seconds": 1.0, "others": 0.01, "discarded": [], "contended": False}


def test_disturbed_measurement_is_repeated() -> None:
    """The result is from the undisturbed attempt, after pauses of growing length."""
    seconds, pauses = iter([9.0, 8.0, 1.0]), list[float]()
    measurement = measure_undisturbed(
        lambda: {"seconds": next(seconds)}, watch=FakeWatch(0.5, 0.2, 0.0), pause=pauses.append
    )
    assert measurement == {"seconds": 1.0, "others": 0.0, "discarded": [0.5, 0.2], "contended": False}
    assert pauses == [2.0, 4.0]


def test_attempts_are_limited() -> None:
    """If every attempt is disturbed, the last one is kept and marked as contended."""
    watch = FakeWatch(*[0.5] * MAX_ATTEMPTS)
    measurement = measure_undisturbed(dict, watch=watch, pause=lambda _: None)
    assert watch.attempts == MAX_ATTEMPTS
    assert measurement["contended"]
    assert len(measurement["discarded"]) == MAX_ATTEMPTS - 1


def test_unknown_share_keeps_the_measurement() -> None:
    """If the system reports no CPU share, the first attempt is kept and `others` is None."""
    measurement = measure_undisturbed(dict, watch=FakeWatch(None), pause=no_pause)
    assert measurement == {"others": None, "discarded": [], "contended": False}


@needs_proc
def test_child_process_is_not_foreign() -> None:
    """The CPU time of a child process is our own, even after the child has ended."""
    before = sum(process_tree_ticks(os.getpid()).values())
    subprocess.run([sys.executable, "-c", BUSY], check=True)
    ticks = sum(process_tree_ticks(os.getpid()).values()) - before
    assert ticks >= BUSY_SECONDS * TICKS_PER_SECOND * 0.9


@needs_proc
def test_idle_child_process_is_foreign() -> None:
    """The CPU time of an engine that should be idle counts as foreign."""

    def wait_for_child() -> float:
        started_at = time.perf_counter()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a reaped child's ticks would count as our own
        return time.perf_counter() - started_at

    with subprocess.Popen([sys.executable, "-c", BUSY]) as child:
        seconds, share = foreign_cpu_share(wait_for_child, idle={child.pid})
    assert share is not None
    assert share * seconds * (os.cpu_count() or 1) >= BUSY_SECONDS * 0.5


@needs_proc
def test_unrelated_process_is_foreign() -> None:
    """The CPU time of a process that does not descend from this one counts as foreign."""

    def run_orphan() -> float:
        # The parent of the busy process ends at once, so nothing links it to this process.
        reader, writer = os.pipe()
        launcher = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]])"
        started_at = time.perf_counter()
        subprocess.run([sys.executable, "-c", launcher, BUSY], stdout=writer, check=True)
        os.close(writer)
        with os.fdopen(reader) as output:
            output.read()  # until the process ends
        return time.perf_counter() - started_at

    seconds, share = foreign_cpu_share(run_orphan)
    assert share is not None
    assert share * seconds * (os.cpu_count() or 1) >= BUSY_SECONDS * 0.9
