"""One measurement: taken again while other processes take the processor, and kept with a note when they do not stop."""

import time
from collections.abc import Callable
from typing import Any

from benchmarks.measurement.cpu_usage import others_share

MAX_FOREIGN_CPU = 0.03  # of all processors' time; the kernel's own threads take up to a hundredth
MAX_ATTEMPTS = 5
PAUSE_SECONDS = 2.0  # times the attempts so far

Figures = dict[str, Any]


def measured(
    measure: Callable[[], Figures],
    *,
    attempts: int = MAX_ATTEMPTS,
    watch: Callable[[Callable[[], Figures]], tuple[Figures, float | None]] = others_share,
    pause: Callable[[float], None] = time.sleep,
) -> Figures:
    """The figures of the first attempt that others left alone, else of the last one, which is then "contended".

    `others` is their share, None where the system does not tell; `discarded` the shares of the attempts before.
    """
    discarded: list[float] = []
    while True:
        figures, others = watch(measure)
        quiet = others is None or others <= MAX_FOREIGN_CPU
        if quiet or len(discarded) == attempts - 1:
            return figures | {
                "others": None if others is None else round(others, 4),
                "discarded": [round(share, 4) for share in discarded],
                "contended": not quiet,
            }
        discarded.append(others or 0.0)
        pause(PAUSE_SECONDS * len(discarded))
