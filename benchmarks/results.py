"""The results file: the machine, the engines under test and every measurement.

A partial run adds its measurements to the file of the same day.
"""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from benchmarks.measurement.disturbance import Measurement

Results = dict[str, Any]
REPLACED_BY = ("part", "model", "group")  # new measurements replace old ones that agree on these keys


def new_results(threads: int) -> Results:
    """Return empty results for this machine and today's date."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "processor": processor(),
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
    """Return the results of a file, or empty results if the file does not exist.

    Raises:
        ValueError: the results are from another machine or another day.
    """
    fresh = new_results(threads)
    if not path.exists():
        return fresh
    results = read(path)
    for key in ("date", "machine"):
        if results[key] != fresh[key]:
            raise ValueError(f"{path}: {key} is {results[key]}, not {fresh[key]}; name another file with --results")
    return results


def read(path: Path) -> Results:
    """Return the results of a file; all requests were greedy before measurements named their kind."""
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    for measurement in results["measurements"]:
        if "contender" in measurement:
            measurement.setdefault("request", "greedy")
    return results


def add(results: Results, measurements: list[Measurement]) -> None:
    """Add measurements; they replace the existing ones of the same part, model and group."""
    kinds = {_kind(measurement) for measurement in measurements}
    kept = [measurement for measurement in results["measurements"] if _kind(measurement) not in kinds]
    results["measurements"] = kept + measurements


def _kind(measurement: Measurement) -> tuple[Any, ...]:
    return tuple(measurement[key] for key in REPLACED_BY)


def save(results: Results, path: Path) -> None:
    """Write the file with one line per measurement, so that diffs are readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("    " + json.dumps(measurement) for measurement in results["measurements"])
    head = json.dumps({key: value for key, value in results.items() if key != "measurements"}, indent=2)
    path.write_text(f'{head[:-2]},\n  "measurements": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


def processor() -> str:
    """Return the processor's name and the vector instructions that affect the measurements."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = values.get("flags", "").split()
    vectors = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16") if flag in flags]
    return f"{values.get('model name', platform.machine())} ({', '.join(vectors) or platform.machine()})"
