"""The upper limits of the device: read and copy bandwidth, and the rate of a large matmul."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

ROUNDS = 10


@dataclass(frozen=True)
class Ceilings:
    """Limits that were measured, not taken from a data sheet."""

    read_bytes_per_second: float
    copy_bytes_per_second: float  # bytes read plus bytes written
    half_multiply_adds_per_second: float


def measure(device: str, *, size_bytes: int, matrix: int) -> Ceilings:
    """Measure with buffers of `size_bytes`, far larger than any cache, and square float16 matrices of size `matrix`."""
    read, copied = _memory(device, size_bytes)
    left, right = (torch.randn(matrix, matrix, device=device).half() for _ in range(2))
    multiplied = median_seconds(lambda: left @ right, device)
    return Ceilings(size_bytes / read, 2 * size_bytes / copied, matrix**3 / multiplied)


def _memory(device: str, size_bytes: int) -> tuple[float, float]:
    """Return the seconds to read and to copy a buffer."""
    numbers = torch.randn(size_bytes // 4, device=device)
    target = torch.empty_like(numbers)
    return median_seconds(numbers.sum, device), median_seconds(lambda: target.copy_(numbers), device)


def median_seconds(run: Callable[[], object], device: str) -> float:
    """Return the median time of a call, including the device's work and excluding the warm-up."""
    times = []
    for _ in range(ROUNDS + 2):
        synchronize(device)
        started_at = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started_at)
    return statistics.median(times[2:])


def synchronize(device: str) -> None:
    """Wait until the device finishes its queued work."""
    if device == "cuda":
        torch.cuda.synchronize()
