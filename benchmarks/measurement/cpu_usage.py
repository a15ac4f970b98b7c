"""Who used the processor: what is being measured, or others. Linux tells; elsewhere None."""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

PROC = Path("/proc")
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")

Result = TypeVar("Result")


def others_share(work: Callable[[], Result], resting: Collection[int] = ()) -> tuple[Result, float | None]:
    """What the work returns, and how much of all processors' time others took meanwhile, the hypervisor included.

    This process and its descendants are no others, but for those that rest, by their ids, with all that descend from
    them: a contender whose threads still spin takes the processor from the next one.
    """
    if not (PROC / "stat").exists():
        return work(), None
    before = _total_and_idle(), our_ticks(os.getpid(), resting)
    result = work()
    after = _total_and_idle(), our_ticks(os.getpid(), resting)
    total, idle = (now - then for now, then in zip(after[0], before[0], strict=True))
    # A process that has ended is in its parent's sums.
    ours = sum(ticks - before[1].get(process, 0) for process, ticks in after[1].items())
    return result, max(0.0, total - idle - ours) / max(total, 1)


def _total_and_idle() -> tuple[int, int]:
    """Ticks of all processors since the start, and those of them in which nothing ran."""
    fields = (PROC / "stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    # User, nice, system, idle, waiting for a disk, interrupts twice, stolen; guests' time is in user's already.
    ticks = [int(field) for field in fields[1:9]]
    return sum(ticks), ticks[3] + ticks[4]


def our_ticks(root: int, without: Collection[int] = ()) -> dict[int, int]:
    """Ticks of a process and of all that descend from it, by process; each with its children that have ended.

    What descends from one of `without` is left out, like that one itself.
    """
    parents, ticks = {}, {}
    for path in PROC.glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        process = int(path.parent.name)
        parents[process] = int(fields[1])
        ticks[process] = sum(int(field) for field in fields[11:15])
    return {process: ticks[process] for process in ticks if _descends(process, root, parents, without)}


def _descends(process: int, root: int, parents: dict[int, int], without: Collection[int]) -> bool:
    while process != root:
        if process not in parents or process in without:
            return False
        process = parents[process]
    return True
