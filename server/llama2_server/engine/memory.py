"""Whether the weights and the KV cache of a model fit into memory; without torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llama2_server.engine.control_groups import control_groups, read
from llama2_server.engine.errors import WeightsError

LOWER_MEMORY_USE = "free memory, or lower context_length_limit or max_concurrent_requests in the card (--card)"

# On a GPU: activations of a prefill chunk, CUDA graphs, compiled kernels and the workspaces of NVIDIA's libraries.
CUDA_RESERVE_BYTES = 600_000_000


class MemoryNeed(NamedTuple):
    """Memory of a model, in bytes."""

    weights_bytes: int
    cache_bytes: int
    tokens: str
    """The size of the KV cache in words, such as "1 x 3072 tokens"."""
    reserve_bytes: int = 0
    """What the computation needs in addition."""


def check_memory(
    directory: Path, device: str, need: MemoryNeed, free_bytes: int | None, total_bytes: int | None = None
) -> None:
    """Check the free memory of a device; None means that it is unknown.

    Raises:
        WeightsError: the weights, the KV cache and the reserve are larger.
    """
    needed_bytes = need.weights_bytes + need.cache_bytes + need.reserve_bytes
    if free_bytes is not None and needed_bytes > free_bytes:
        free = f"{free_bytes / 1e9:.1f}" + (f" of {total_bytes / 1e9:.1f}" if total_bytes is not None else "")
        reserve = f", {need.reserve_bytes / 1e9:.1f} GB to compute with" if need.reserve_bytes else ""
        raise WeightsError(
            f"{directory}: needs {needed_bytes / 1e9:.1f} GB on {device} ({need.weights_bytes / 1e9:.1f} GB of "
            f"weights, {need.cache_bytes / 1e9:.1f} GB of KV cache for {need.tokens}{reserve}), but only "
            f"{free} GB are free; {LOWER_MEMORY_USE}"
        )


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory that this process can still use, by Linux and by its control groups; None if unknown.

    Memory that only caches files counts as free.
    """
    limits = [*_available_by_system(root), *_available_by_groups(root)]
    return max(0, min(limits)) if limits else None


def _available_by_system(root: Path) -> Iterator[int]:
    for line in read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield 1024 * int(value.split()[0])


def _available_by_groups(root: Path) -> Iterator[int]:
    for group in control_groups("memory", root):
        if group.version == 2:
            names = ("memory.max", "memory.current", "inactive_file")
        else:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        yield from _available_in_group(group.directory, *names)


def _available_in_group(directory: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    values = [read(directory / name).strip() for name in (limit, usage)]
    if all(value.isdecimal() for value in values):  # "max" means that there is no limit
        statistics = dict(line.split(" ", 1) for line in read(directory / "memory.stat").splitlines())
        yield int(values[0]) - int(values[1]) + int(statistics.get(cache, 0))
