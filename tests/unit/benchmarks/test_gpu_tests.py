"""The run of the GPU tests in `make bench-gpu`, with programs that stand in for pytest and compute-sanitizer."""

import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu.measurement import gpu_tests
from tests.support.repository import ROOT

OUTPUT = """\
tests/unit/engine/cuda/test_a.py::test_one[(8, 128)-float16] PASSED [ 33%]
tests/unit/engine/cuda/test_a.py::test_two SKIPPED (no GPU)       [ 66%]
tests/unit/engine/cuda/test_a.py::test_three FAILED               [100%]
========= ERROR SUMMARY: 2 errors
FAILED tests/unit/engine/cuda/test_a.py::test_three - assert 1 == 2
"""


def stand_in(path: Path, status: int) -> list[str]:
    """Return a command that prints OUTPUT."""
    path.write_text(f"print({OUTPUT!r}, end='')\nraise SystemExit({status})\n")
    return [sys.executable, str(path)]


def test_each_test_is_counted_when_it_ends(tmp_path: Path) -> None:
    """So a time limit keeps the counts; a failure ends the part with the last lines of the output."""
    found: list[dict[str, Any]] = []
    with pytest.raises(SystemExit, match=r"memcheck: exit status 1:\n[^$]*assert 1 == 2"):
        found += (result for _, result in gpu_tests._results("memcheck", stand_in(tmp_path / "run.py", 1), {}))
    assert [(one["passed"], one["skipped"], one["failed"], one["sanitizer_findings"]) for one in found[:4]] == [
        (1, 0, [], None),
        (1, 1, [], None),
        (1, 1, ["test_three"], None),
        (1, 1, ["test_three"], 2),
    ]
    assert [one["complete"] for one in found] == [False] * 5


def test_a_run_without_failures_is_complete(tmp_path: Path) -> None:
    """The last result says so."""
    *_, (name, last) = gpu_tests._results("tests", stand_in(tmp_path / "run.py", 0), {})
    assert (name, last["complete"]) == ("tests", True)


def test_the_sanitizer_runs_the_tests_of_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both tools, with memory that torch does not cache, and with a separate exit status for findings."""
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> "$(dirname "$0")/calls"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert [name for name, _ in gpu_tests.sanitize()] == ["memcheck", "racecheck"]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[:5] for call in calls] == [
        ["1", "--tool", tool, "--error-exitcode", "86"] for tool in ("memcheck", "racecheck")
    ]
    files = [word for word in calls[0].split() if word.endswith(".py")]
    assert [path.name for path in map(Path, files)] == list(gpu_tests.KERNELS)


def test_the_files_of_tests_exist() -> None:
    """A renamed file would end the part on a GPU."""
    for file in (*gpu_tests.ON_GPU, *gpu_tests.KERNELS):
        assert (ROOT / gpu_tests.FOLDER / file).is_file()
