"""The tests that need a GPU, and the tests of the kernels, alone and in NVIDIA's compute-sanitizer."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

FOLDER = "tests/unit/engine/cuda"
ON_GPU = ("test_server_on_gpu.py", "test_on_gpu.py", "test_engine_on_gpu.py")
KERNELS = ("test_kernels.py", "test_fused_kernels.py", "test_fused_sampling.py", "test_7b_widths.py")
PYTEST = ("-m", "pytest", "-c", "benchmarks/gpu/pytest.ini", "--rootdir", ".", "--confcutdir", "tests/unit/engine")
PYTEST_OPTIONS = ("--import-mode=importlib", "-v", "--tb=short", "-p", "no:cacheprovider")
OUTCOME = re.compile(r"::(\S.*?) (PASSED|FAILED|ERROR|SKIPPED)\b")
SANITIZER_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
# Of torch's cached blocks, the sanitizer would see only the whole.
WITHOUT_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
LAST_LINES = 15


@dataclass(slots=True)
class Outcomes:
    """The tests that have ended so far."""

    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    sanitizer_findings: int | None = None
    """Numbers of the sanitizer's summaries, added up; None without one."""
    complete: bool = False


def run(*, on_gpu: bool) -> Iterator[tuple[str, Any]]:
    """Yield the results after each test; without a GPU, only of the tests that need one, which are then skipped."""
    yield from _results("tests", _pytest((*ON_GPU, *KERNELS) if on_gpu else ON_GPU), {})


def sanitize() -> Iterator[tuple[str, Any]]:
    """Run the tests of the kernels in memcheck, which finds wrong addresses, and in racecheck (shared memory)."""
    for tool in ("memcheck", "racecheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86", *_pytest(KERNELS)]
        yield from _results(tool, command, WITHOUT_CACHE)


def _pytest(files: Sequence[str]) -> list[str]:
    return [sys.executable, *PYTEST, *PYTEST_OPTIONS, *(f"{FOLDER}/{file}" for file in files)]


def _results(name: str, command: Sequence[str], environment: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Run the command and yield the results of its tests under this name.

    Raises:
        SystemExit: it failed.
    """
    results, lines = Outcomes(), list[str]()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    ) as process:
        for line in process.stdout or ():
            print(line, end="", file=sys.stderr, flush=True)
            lines = [*lines[1 - LAST_LINES :], line]
            if _add(results, line):
                yield name, asdict(results)
    results.complete = process.returncode == 0
    yield name, asdict(results)
    if process.returncode:
        raise SystemExit(f"{name}: exit status {process.returncode}:\n{''.join(lines)}")


def _add(results: Outcomes, line: str) -> bool:
    """Add what a line of the output reports; return whether it is about a test or a summary of the sanitizer."""
    if summary := SANITIZER_SUMMARY.search(line):
        results.sanitizer_findings = (results.sanitizer_findings or 0) + int(summary[1])
        return True
    found = OUTCOME.search(line)
    if found is None or not line.startswith(FOLDER):
        return False
    test, outcome = found.groups()
    if outcome == "PASSED":
        results.passed += 1
    elif outcome == "SKIPPED":
        results.skipped += 1
    else:
        results.failed.append(test)
    return True
