"""A results file: the machine, the contenders, and every measurement; a run in parts adds to it what it measured."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from benchmarks.measurement.disturbance import Figures

Results = dict[str, Any]
REPLACES = ("part", "model", "group")  # what is measured anew takes the place of what agrees in these


def new_results(threads: int) -> Results:
    """No measurements yet, on this machine, today."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": threads,
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
        },
        "weights": {},
        "contenders": {},
        "not_run": {},
        "measurements": [],
    }


def load(path: Path, threads: int) -> Results:
    """The file's results, or none where there is no file; raises ValueError if they are another machine's or day's."""
    fresh = new_results(threads)
    if not path.exists():
        return fresh
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    for key in ("date", "machine"):
        if results[key] != fresh[key]:
            raise ValueError(f"{path}: is of {results[key]}, this is {fresh[key]}: name another file")
    return results


def add(results: Results, measurements: list[Figures]) -> None:
    """Put measurements in, in place of those of the same part, model and group."""
    kinds = {tuple(figures[key] for key in REPLACES) for figures in measurements}
    kept = [figures for figures in results["measurements"] if tuple(figures[key] for key in REPLACES) not in kinds]
    results["measurements"] = kept + measurements


def save(results: Results, path: Path) -> None:
    """Write the file, a measurement a line, so that a difference can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("    " + json.dumps(figures) for figures in results["measurements"])
    head = json.dumps({key: value for key, value in results.items() if key != "measurements"}, indent=2)
    path.write_text(f'{head[:-2]},\n  "measurements": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


def _processor() -> str:
    """Its name, and the vector instructions that the figures depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = values.get("flags", "").split()
    vectors = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16") if flag in flags]
    return f"{values.get('model name', platform.machine())} ({', '.join(vectors) or platform.machine()})"
