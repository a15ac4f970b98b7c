"""What the device can do at best: reading, copying, multiplying."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

ROUNDS = 10


@dataclass(frozen=True)
class Ceilings:
    """Measured, not from a data sheet."""

    read_bytes_per_second: float
    copy_bytes_per_second: float  # read and written counted
    half_multiply_adds_per_second: float


def measure(device: str, *, size_bytes: int, matrix: int) -> Ceilings:
    """On buffers of `size_bytes`, far larger than any cache, and square float16 matrices."""
    read, copied = _memory(device, size_bytes)
    left, right = (torch.randn(matrix, matrix, device=device).half() for _ in range(2))
    multiplied = median_seconds(lambda: left @ right, device)
    return Ceilings(size_bytes / read, 2 * size_bytes / copied, matrix**3 / multiplied)


def _memory(device: str, size_bytes: int) -> tuple[float, float]:
    """Seconds of reading and of copying a buffer."""
    numbers = torch.randn(size_bytes // 4, device=device)
    target = torch.empty_like(numbers)
    return median_seconds(numbers.sum, device), median_seconds(lambda: target.copy_(numbers), device)


def median_seconds(run: Callable[[], object], device: str) -> float:
    """Of one call, the device's work included; the first calls do not count."""
    times = []
    for _ in range(ROUNDS + 2):
        synchronize(device)
        begun = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def synchronize(device: str) -> None:
    """Wait for what the device was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()
