"""The lines of the mutated modules that each test file executes, measured with coverage.py.

A mutant needs only the test files that execute its lines. A process that is killed leaves no lines: a mutant that only
such a process executes counts as not found.
"""

import hashlib
import json
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import coverage

from tools.mutants.mutations import Mutant
from tools.mutants.runner import copied_repository, first_failure
from tools.mutants.suites import SERVER

MEASURING_SECONDS = 1800
"""Time limit of a test file without a mutant."""
_CONFIGURATION = """
[run]
parallel = true
data_file = {data}/executed
include = {server}/*
concurrency = thread,greenlet
patch = _exit
sigterm = true
"""


class FailingTest(Exception):
    """A test fails without a mutant."""


@dataclass(frozen=True)
class TestFile:
    """A test file, what it executes, and how long it takes."""

    path: str
    seconds: float
    lines: dict[str, list[int]]
    """Per module, the executed lines."""

    def executes(self, mutant: Mutant) -> bool:
        """Return whether the file executes the mutant's statement."""
        return any(line in mutant.lines for line in self.lines.get(str(mutant.path), ()))


def measured(root: Path, paths: Collection[str], cache: Path, jobs: int) -> list[TestFile]:
    """Return the test files, measured now, or read from the cache if neither they nor the server have changed.

    Raises:
        FailingTest: a test fails.
    """
    known = json.loads(cache.read_text(encoding="utf-8")) if cache.exists() else {}
    server = _digest(sorted((root / SERVER).rglob("*.py")))
    keys = {path: f"{path} {_digest([root / path])} {server}" for path in paths}
    missing = [path for path, key in keys.items() if key not in known]
    with ThreadPoolExecutor(jobs) as workers:
        for path, result in zip(missing, workers.map(partial(_measured, root), missing), strict=True):
            known[keys[path]] = [result.seconds, result.lines]
            cache.write_text(json.dumps(known), encoding="utf-8")
    return [TestFile(path, *known[key]) for path, key in keys.items()]


def fastest_first(files: Iterable[TestFile], mutant: Mutant) -> list[TestFile]:
    """Return the files that execute a mutant; those that are named after its module come first."""
    name = f"test_{mutant.path.stem}"
    found = [one for one in files if one.executes(mutant)]
    return sorted(found, key=lambda one: (not Path(one.path).stem.startswith(name), one.seconds))


def _measured(root: Path, path: str) -> TestFile:
    with copied_repository(root) as copy:
        data, configuration = copy / "executed", copy / "executed.ini"
        data.mkdir()
        text = _CONFIGURATION.format(data=data, server=copy / SERVER)
        configuration.write_text(text, encoding="utf-8")
        started = time.monotonic()
        if failure := first_failure(copy, [path], MEASURING_SECONDS, coverage_configuration=configuration):
            raise FailingTest(f"{failure} fails without a mutant; repair it first")
        seconds = time.monotonic() - started
        lines: dict[str, set[int]] = {}
        for file in data.iterdir():
            for module, executed in _lines(file):
                lines.setdefault(str(Path(module).relative_to(copy)), set()).update(executed)
    print(f"measured  {path} in {seconds:.1f} s", flush=True)
    return TestFile(path, round(seconds, 1), {module: sorted(executed) for module, executed in sorted(lines.items())})


def _lines(file: Path) -> list[tuple[str, list[int]]]:
    """Return the modules and lines of coverage.py's file; nothing if a process was killed while it wrote the file."""
    data = coverage.CoverageData(str(file))
    try:
        data.read()
    except coverage.exceptions.DataError:
        return []
    return [(module, data.lines(module) or []) for module in data.measured_files()]


def _digest(paths: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
