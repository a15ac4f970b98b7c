"""Measure the GPU path: `make bench-gpu`, or `python -m benchmarks.gpu` if the packages are already installed.

Weights are random, have Llama-2-7B's shape, and are created on the device. Each part runs in a separate process and
is ended at its time limit: if one fails, its error is in the results, and the others are measured. The results are
written after each measurement, to benchmarks/results/, and at the end the report and the chart; a further run adds its
parts to them. Without a GPU, `--shape tiny --device cpu` tests the benchmark itself.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.chart import draw_svg
from benchmarks.gpu.models import SHAPES
from benchmarks.gpu.part_process import PartFailed, results_of
from benchmarks.gpu.parts import ABOUT_LIMIT_SECONDS, PARTS
from benchmarks.gpu.report import report
from benchmarks.gpu.target import Target

RESULTS = Path(__file__).parent.parent / "results"


def main() -> int:
    """Parse the flags, measure, write the results and print the report. Return 1 if a part failed."""
    arguments = _arguments()
    if arguments.merge:
        results = merged(json.loads(path.read_text(encoding="utf-8")) for path in arguments.merge)
        path = write(results, arguments.out)
    else:
        target = Target(arguments.shape, arguments.device, arguments.rows)
        results, path = measure(target, arguments.parts, arguments.out, arguments.limit_factor)
    if importlib.util.find_spec("matplotlib"):
        path.with_suffix(".svg").write_text(draw_svg(results), encoding="utf-8")
    else:
        print(f"no chart: matplotlib is not installed; elsewhere, --merge {path.name} draws it", file=sys.stderr)
    text = report(results)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if results["failures"] else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b", help="Shape of the model.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="Device to measure.")
    parser.add_argument(
        "--rows", type=int, default=16, help="Number of simultaneous requests, and of slots of the engine."
    )
    limits = ", ".join(f"{name} ({part.limit_seconds} s)" for name, part in PARTS.items())
    parser.add_argument(
        "--parts",
        type=_parts,
        default=list(PARTS),
        help=f"Parts, separated by commas, and their time limits: {limits}.",
    )
    parser.add_argument(
        "--limit-factor", type=float, default=1.0, help="Factor of the time limits, for a slow machine."
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="Folder for the results.")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="Measure nothing; report the results of several runs on one machine together.",
    )
    return parser.parse_args()


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    return parts


def measure(target: Target, parts: Sequence[str], out: Path, limit_factor: float = 1.0) -> tuple[dict[str, Any], Path]:
    """Measure the parts in the given order and write the results after each measurement. Return them and their file."""
    results: dict[str, Any] = {"seconds": {}, "failures": {}}
    try:
        results |= part_results("about", target, ABOUT_LIMIT_SECONDS * limit_factor)
    except PartFailed as error:
        sys.exit(str(error))
    path = _path(results, out)
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["about"] == results["about"]:
            results = earlier
    for part in parts:
        started_at = time.monotonic()
        results["failures"].pop(part, None)
        try:
            for name, result in part_results(part, target, PARTS[part].limit_seconds * limit_factor):
                print(f"{name}: {result}", file=sys.stderr, flush=True)
                results[name] = result
                write(results, out)
        except PartFailed as error:
            print(f"{part}: {error}", file=sys.stderr, flush=True)
            results["failures"][part] = str(error)
        results["seconds"][part] = round(time.monotonic() - started_at, 1)
        write(results, out)
    return results, path


def part_results(part: str, target: Target, limit_seconds: float) -> Iterator[tuple[str, Any]]:
    """Run a part in a separate process and yield its results; see `results_of`."""
    command = [sys.executable, "-m", "benchmarks.gpu.part", part, target.shape, target.device, str(target.rows)]
    return results_of(command, limit_seconds)


def merged(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the results of several runs as one; a later run replaces the parts of an earlier one."""
    results: dict[str, Any] = {"seconds": {}, "failures": {}}
    for run in runs:
        if results.get("about", run["about"]) | {"date": ""} != run["about"] | {"date": ""}:
            sys.exit("--merge: the runs have different machines, versions or shapes; report them separately")
        failures = {part: text for part, text in results["failures"].items() if part not in run["seconds"]}
        seconds = results["seconds"] | run["seconds"]
        results = results | run | {"seconds": seconds, "failures": failures | run["failures"]}
    return results


def write(results: dict[str, Any], out: Path) -> Path:
    """Write the results and return their file."""
    out.mkdir(parents=True, exist_ok=True)
    path = _path(results, out)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return path


def _path(results: dict[str, Any], out: Path) -> Path:
    return out / f"{results['about']['date']}-gpu-{results['about']['shape']}.json"


if __name__ == "__main__":
    sys.exit(main())
