"""Repetition of measurements that foreign processes disturb."""

import time
from collections.abc import Callable
from typing import Any

from benchmarks.measurement.cpu_usage import foreign_cpu_share

MAX_FOREIGN_CPU = 0.03  # share of all CPU time; the kernel's own threads take up to 0.01
MAX_ATTEMPTS = 5
PAUSE_SECONDS = 2.0  # multiplied by the number of attempts so far

Measurement = dict[str, Any]


def measure_undisturbed(
    measure: Callable[[], Measurement],
    *,
    attempts: int = MAX_ATTEMPTS,
    watch: Callable[[Callable[[], Measurement]], tuple[Measurement, float | None]] = foreign_cpu_share,
    pause: Callable[[float], None] = time.sleep,
) -> Measurement:
    """Return the first undisturbed measurement, or the last attempt, which is then marked as "contended".

    "others" is the foreign CPU share, or None if the system does not report it. "discarded" lists the shares of the
    discarded attempts.
    """
    discarded: list[float] = []
    while True:
        measurement, share = watch(measure)
        undisturbed = share is None or share <= MAX_FOREIGN_CPU
        if undisturbed or len(discarded) == attempts - 1:
            return measurement | {
                "others": None if share is None else round(share, 4),
                "discarded": [round(earlier, 4) for earlier in discarded],
                "contended": not undisturbed,
            }
        discarded.append(share or 0.0)
        pause(PAUSE_SECONDS * len(discarded))
