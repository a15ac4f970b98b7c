"""Whether the weights and the KV cache of a model fit into memory; without torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llama2_server.engine.errors import WeightsError

LOWER_MEMORY_USE = "free memory, or lower context_length_limit or max_concurrent_requests in the card (--card)"


class MemoryNeed(NamedTuple):
    """Memory of a model, in bytes."""

    weights_bytes: int
    cache_bytes: int
    tokens: str
    """The size of the KV cache in words, such as "1 x 3072 tokens"."""


def check_memory(
    directory: Path, device: str, need: MemoryNeed, free_bytes: int | None, total_bytes: int | None = None
) -> None:
    """Check the free memory of a device; None means that it is unknown.

    Raises:
        WeightsError: the weights and the KV cache are larger.
    """
    needed_bytes = need.weights_bytes + need.cache_bytes
    if free_bytes is not None and needed_bytes > free_bytes:
        free = f"{free_bytes / 1e9:.1f}" + (f" of {total_bytes / 1e9:.1f}" if total_bytes is not None else "")
        raise WeightsError(
            f"{directory}: needs {needed_bytes / 1e9:.1f} GB on {device} ({need.weights_bytes / 1e9:.1f} GB of "
            f"weights, {need.cache_bytes / 1e9:.1f} GB of KV cache for {need.tokens}), but only "
            f"{free} GB are free; {LOWER_MEMORY_USE}"
        )


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory that this process can still use, by Linux and by its control groups; None if unknown.

    Memory that only caches files counts as free.
    """
    limits = [*_available_by_system(root), *_available_by_groups(root)]
    return max(0, min(limits)) if limits else None


def _available_by_system(root: Path) -> Iterator[int]:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield 1024 * int(value.split()[0])


def _available_by_groups(root: Path) -> Iterator[int]:
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = mount / path.strip("/")
        # In a container, the path may be the host's, and the container's own group is at the mount.
        for directory in dict.fromkeys((group, *group.parents)):
            if directory.is_relative_to(mount):
                yield from _available_in_group(directory, *names)


def _available_in_group(directory: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    values = [_read(directory / name).strip() for name in (limit, usage)]
    if all(value.isdecimal() for value in values):  # "max" means that there is no limit
        statistics = dict(line.split(" ", 1) for line in _read(directory / "memory.stat").splitlines())
        yield int(values[0]) - int(values[1]) + int(statistics.get(cache, 0))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
