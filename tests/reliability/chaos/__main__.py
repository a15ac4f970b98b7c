"""Play scenes of faults on real processes, and check what the service promises: `make chaos`.

All addresses are on loopback. Each scene has a time limit. It prints a table, and exits with 1 if a promise is broken.
"""

import argparse
import asyncio
import functools
import sys
import tempfile
import time
from pathlib import Path

from tests.reliability.chaos.connections import play_connections
from tests.reliability.chaos.cuts import play_cuts
from tests.reliability.chaos.disk import play_full_disk
from tests.reliability.chaos.floods import play_floods
from tests.reliability.chaos.kills import play_kills
from tests.reliability.chaos.scene import LIMIT_SECONDS, Play, Scene, play
from tests.reliability.chaos.stores import play_postgresql, play_redis
from tests.reliability.chaos.usage import play_usage
from tests.support.forks import Forks

KILLS = 200
CUTS = 10_000
CUT_SECONDS = 2
"""Time per cut after which that scene counts as hung."""


def scenes(kills: int, cuts: int) -> dict[str, Play]:
    """Return the scenes by name."""
    return {
        "kills": functools.partial(play_kills, kills=kills),
        "redis": play_redis,
        "postgresql": play_postgresql,
        "full-disk": play_full_disk,
        "floods": play_floods,
        "connections": play_connections,
        "usage": play_usage,
        "cuts": functools.partial(play_cuts, cuts=cuts),
    }


def main() -> int:
    """Play the scenes of the command line, and return the exit code."""
    names = list(scenes(KILLS, CUTS))
    parser = argparse.ArgumentParser(prog="make chaos ARGS=…", description="Faults on real processes.")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="seed of requests and faults; default: time")
    parser.add_argument("--kills", type=int, default=KILLS, help="number of SIGKILLs at completion")
    parser.add_argument("--cuts", type=int, default=CUTS, help="number of streams that break off")
    parser.add_argument("--scenes", nargs="+", choices=names, default=names, help="scenes to play; default: all")
    options = parser.parse_args()
    broken = False
    with tempfile.TemporaryDirectory() as name, Forks.running(Path(name)) as forks:
        print(f"{'scene':<12} {'result':<8} {'seconds':>7}  figures", flush=True)
        for scene, run in scenes(options.kills, options.cuts).items():
            if scene in options.scenes:
                limit = LIMIT_SECONDS + (CUT_SECONDS * options.cuts if scene == "cuts" else 0)
                played = asyncio.run(play(forks, Path(name) / scene, f"{options.seed} {scene}", run, limit))
                print("\n".join(_rows(scene, played)), flush=True)
                broken |= bool(played.broken)
        if broken:
            print(f"--- last lines of the servers' log\n{_last_lines(forks.log)}---")
    print(f"seed {options.seed}: make chaos ARGS='--seed {options.seed}' repeats the requests and faults")
    return 1 if broken else 0


def _rows(name: str, scene: Scene) -> list[str]:
    result = "NOT RUN" if scene.skipped else "BROKEN" if scene.broken else "kept"
    text = scene.skipped or "; ".join(scene.figures)
    row = f"{name:<12} {result:<8} {scene.seconds:>7.1f}  {text}"
    return [row, *(f"{'':<12} {promise}" for promise in scene.broken)]


def _last_lines(log: Path, lines: int = 30) -> str:
    return "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-lines:])


if __name__ == "__main__":
    sys.exit(main())
