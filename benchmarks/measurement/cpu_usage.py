"""The share of CPU time that foreign processes take during a measurement; available on Linux only."""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

PROC = Path("/proc")
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

Result = TypeVar("Result")


def foreign_cpu_share(work: Callable[[], Result], idle: Collection[int] = ()) -> tuple[Result, float | None]:
    """Run the work; return its result and the share of all CPU time that foreign processes took during it.

    The hypervisor is foreign; this process and its descendants are not. `idle` lists the ids of processes that should
    rest: they and their descendants count as foreign, because threads that still spin take CPU time from the engine
    under test. Without /proc/stat the share is None.
    """
    if not (PROC / "stat").exists():
        return work(), None
    before = _total_and_idle_ticks(), process_tree_ticks(os.getpid(), idle)
    result = work()
    after = _total_and_idle_ticks(), process_tree_ticks(os.getpid(), idle)
    total, unused = (now - then for now, then in zip(after[0], before[0], strict=True))
    # The ticks of a process that has ended are in the counters of its parent.
    own = sum(ticks - before[1].get(process, 0) for process, ticks in after[1].items())
    return result, max(0.0, total - unused - own) / max(total, 1)


def _total_and_idle_ticks() -> tuple[int, int]:
    """Return the ticks of all CPUs since boot, and the number of idle ticks among them."""
    fields = (PROC / "stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    # user, nice, system, idle, iowait, irq, softirq, steal; guest time is already part of user time.
    ticks = [int(field) for field in fields[1:9]]
    return sum(ticks), ticks[3] + ticks[4]


def process_tree_ticks(root: int, excluded: Collection[int] = ()) -> dict[int, int]:
    """Return the ticks of a process and its descendants by process id, each with its ended children.

    The processes in `excluded` and their descendants are left out.
    """
    parents, ticks = {}, {}
    for path in PROC.glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # the process has just ended
            continue
        process = int(path.parent.name)
        parents[process] = int(fields[1])
        ticks[process] = sum(int(field) for field in fields[11:15])
    return {process: ticks[process] for process in ticks if _descends(process, root, parents, excluded)}


def _descends(process: int, root: int, parents: dict[int, int], excluded: Collection[int]) -> bool:
    while process != root:
        if process not in parents or process in excluded:
            return False
        process = parents[process]
    return True
