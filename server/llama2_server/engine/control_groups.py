"""Linux control groups of this process: limits of its memory and its processor time; without torch."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class ControlGroup(NamedTuple):
    """A group that limits this process."""

    directory: Path
    version: int
    """1 or 2: the names of the files differ."""


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[ControlGroup]:
    """Yield the groups with the controller, such as "memory": the group of this process and those above it."""
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, version = root / "sys/fs/cgroup", 2
        elif controller in controllers.split(","):
            mount, version = root / "sys/fs/cgroup" / controller, 1
        else:
            continue
        group = mount / path.strip("/")
        # In a container, the path may be the host's, and the container's own group is at the mount.
        for directory in dict.fromkeys((group, *group.parents)):
            if directory.is_relative_to(mount):
                yield ControlGroup(directory, version)


def available_cores(root: Path = Path("/")) -> int:
    """Return the number of cores that this process can use all the time, by its affinity and its quotas, at least 1.

    More threads than that would use up the quota together, and the system would then stop all of them for a while.
    """
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for group in control_groups("cpu", root):
        if group.version == 2:
            quota, _, period = read(group.directory / "cpu.max").partition(" ")  # the quota can be "max"
        else:
            quota, period = (read(group.directory / f"cpu.cfs_{name}_us") for name in ("quota", "period"))  # or -1
        if quota.strip().isdecimal() and period.strip().isdecimal() and int(period) > 0:
            cores = min(cores, int(quota) / int(period))
    return max(1, int(cores))


def read(path: Path) -> str:
    """Return the text of a file of Linux; an empty text if it does not exist."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
