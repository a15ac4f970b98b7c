"""Memory, file descriptors and threads of a process over its requests, and their drift."""

import asyncio
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WARM_UP_SHARE = 0.25
"""Share of the requests that fill the caches and the allocator's free lists."""
REQUESTS_OF_DRIFT = 10_000
MAX_MEMORY_DRIFT_MB = 5.0
MAX_COUNT_DRIFT = 5.0
"""Growth of file descriptors or threads per 10,000 requests."""


@dataclass(frozen=True)
class Sample:
    """The state of the process at one time."""

    seconds: float
    requests: int
    memory_mb: float
    files: float
    """Open file descriptors."""
    threads: float


async def take_samples(pid: int, counts: Counter[tuple[str, str]], seconds: float) -> list[Sample]:
    """Take a sample each second."""
    process, started_at = Path(f"/proc/{pid}"), time.monotonic()
    samples: list[Sample] = []
    while (now := time.monotonic() - started_at) < seconds:
        pages = int((process / "statm").read_text().split()[1])
        files, threads = (len(list((process / name).iterdir())) for name in ("fd", "task"))
        memory = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        samples.append(Sample(now, counts.total(), memory, files, threads))
        await asyncio.sleep(1)
    return samples


def after_warm_up(samples: list[Sample]) -> list[Sample]:
    """Return the samples after the warm-up."""
    first = WARM_UP_SHARE * samples[-1].requests
    return [sample for sample in samples if sample.requests >= first]


def drift(requests: list[int], values: list[float]) -> float:
    """Return the slope of the values by least squares, per 10,000 requests."""
    slope, _ = np.polyfit(np.array(requests, dtype=float), np.array(values, dtype=float), 1)
    return float(slope) * REQUESTS_OF_DRIFT


def drifts(samples: list[Sample]) -> dict[str, float]:
    """Return the drift of memory (in MB), files and threads per 10,000 requests, after the warm-up."""
    rest = after_warm_up(samples)
    requests = [sample.requests for sample in rest]
    return {
        "memory (MB)": drift(requests, [sample.memory_mb for sample in rest]),
        "file descriptors": drift(requests, [sample.files for sample in rest]),
        "threads": drift(requests, [sample.threads for sample in rest]),
    }


def exceeded(found: dict[str, float]) -> list[str]:
    """Return a line for each drift beyond its limit."""
    limits = dict.fromkeys(found, MAX_COUNT_DRIFT) | {"memory (MB)": MAX_MEMORY_DRIFT_MB}
    return [
        f"{name}: {value:+.2f} per {REQUESTS_OF_DRIFT:,} requests, the limit is {limits[name]:g}"
        for name, value in found.items()
        if value >= limits[name]
    ]
