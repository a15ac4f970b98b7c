import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from benchmarks.measurement.cpu_usage import TICKS_A_SECOND, others_share, our_ticks
from benchmarks.measurement.disturbance import MAX_ATTEMPTS, Figures, measured

BUSY_SECONDS = 0.5
BUSY = f"import time\nwhile time.process_time() < {BUSY_SECONDS}: pass"


def no_pause(seconds: float) -> None:
    pytest.fail(f"a pause of {seconds} seconds")


class Watch:
    """Tells one share after another, and counts the attempts."""

    def __init__(self, *shares: float | None) -> None:
        self.shares: Iterator[float | None] = iter(shares)
        self.attempts = 0

    def __call__(self, measure: Callable[[], Figures]) -> tuple[Figures, float | None]:
        self.attempts += 1
        return measure(), next(self.shares)


def test_a_quiet_measurement_is_kept() -> None:
    """It is taken once."""
    watch = Watch(0.01)
    figures = measured(lambda: {"seconds": 1.0}, watch=watch, pause=no_pause)
    assert figures == {"seconds": 1.0, "others": 0.01, "discarded": [], "contended": False}


def test_a_disturbed_measurement_is_discarded() -> None:
    """It is taken again, after pauses that grow, and the figures are the quiet attempt's."""
    seconds, pauses = iter([9.0, 8.0, 1.0]), list[float]()
    figures = measured(lambda: {"seconds": next(seconds)}, watch=Watch(0.5, 0.2, 0.0), pause=pauses.append)
    assert figures == {"seconds": 1.0, "others": 0.0, "discarded": [0.5, 0.2], "contended": False}
    assert pauses == [2.0, 4.0]


def test_attempts_end() -> None:
    """Where others never stop, the last attempt is kept and says so."""
    watch = Watch(*[0.5] * MAX_ATTEMPTS)
    figures = measured(dict, watch=watch, pause=lambda _: None)
    assert watch.attempts == MAX_ATTEMPTS
    assert figures["contended"]
    assert len(figures["discarded"]) == MAX_ATTEMPTS - 1


def test_a_system_that_does_not_tell() -> None:
    """The measurement is kept, and `others` is None."""
    figures = measured(dict, watch=Watch(None), pause=no_pause)
    assert figures == {"others": None, "discarded": [], "contended": False}


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="NOT TESTED: only Linux tells who took the processor")
def test_a_child_is_no_other() -> None:
    """What our own child computes is ours, also when it has ended."""
    before = sum(our_ticks(os.getpid()).values())
    subprocess.run([sys.executable, "-c", BUSY], check=True)
    assert sum(our_ticks(os.getpid()).values()) - before >= BUSY_SECONDS * TICKS_A_SECOND * 0.9


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="NOT TESTED: only Linux tells who took the processor")
def test_a_child_that_should_rest_is_another() -> None:
    """What a contender does while another one is measured is not that one's."""

    def until_it_ends() -> float:
        begun = time.perf_counter()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # its ticks would be ours if it were gone
        return time.perf_counter() - begun

    with subprocess.Popen([sys.executable, "-c", BUSY]) as child:
        seconds, share = others_share(until_it_ends, resting={child.pid})
    assert share is not None
    assert share * seconds * (os.cpu_count() or 1) >= BUSY_SECONDS * 0.5


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="NOT TESTED: only Linux tells who took the processor")
def test_a_stranger_is_another() -> None:
    """What it computes counts as others' share."""

    def a_stranger() -> float:
        # Its parent ends at once, so that nothing says any more that it descends from us.
        reader, writer = os.pipe()
        launcher = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]])"
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", launcher, BUSY], stdout=writer, check=True)
        os.close(writer)
        with os.fdopen(reader) as said:
            said.read()  # to its end
        return time.perf_counter() - begun

    seconds, share = others_share(a_stranger)
    assert share is not None
    assert share * seconds * (os.cpu_count() or 1) >= BUSY_SECONDS * 0.9
