"""Run the tests of a package on a copy of the repository, in a new process that already has the libraries."""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import coverage
import pytest

ROOT = Path(__file__).parent.parent.parent
LIBRARIES = [
    "grpc.aio",
    "jsonschema",
    "pytest",
    "sqlalchemy",
    "torch",
    "transformers.models.llama",
    "yaml",
]
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(LIBRARIES)


@contextmanager
def copied_repository(root: Path = ROOT) -> Iterator[Path]:
    """Copy the sources and tests for the body."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "node_modules")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        shutil.copytree(root, name, ignore=ignored, symlinks=True, dirs_exist_ok=True)
        yield Path(name)


def first_failure(
    copy: Path, tests: list[str], limit_seconds: float, *, coverage_configuration: Path | None = None
) -> str | None:
    """Run tests in a copy of the repository until the first one fails, and return its name; None if all pass.

    Tests that take longer than the limit fail. With a configuration, coverage.py measures the tests and the processes
    that they start.
    """
    report = copy / "first-failure.txt"
    report.unlink(missing_ok=True)
    process = _PROCESSES.Process(target=_run_tests, args=(copy, tests, report, coverage_configuration))
    process.start()
    process.join(limit_seconds)
    code = process.exitcode
    process.kill()  # it may not have its own group yet
    if process.pid is not None:
        # A mutant can cause server processes to continue, which are in the group of its tests.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if code == 0:
        return None
    if report.exists():
        return report.read_text(encoding="utf-8")
    return "time limit" if code is None else f"exit code {code}"


class _FirstFailure:
    """Writes the name of the first test or test file that fails."""

    def __init__(self, report: Path) -> None:
        self._report = report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._add(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._add(report)

    def _add(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed and not self._report.exists():
            self._report.write_text(report.nodeid, encoding="utf-8")


def _run_tests(copy: Path, tests: list[str], report: Path, coverage_configuration: Path | None) -> None:
    """Run the tests in this process, and exit with pytest's code."""
    os.setsid()
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    os.chdir(copy)
    # The installed packages lead to the repository; these folders come before them, also in processes of tests.
    folders = [str(copy / name) for name in (".", "server", "client", "protos")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(folders), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path[:0] = folders
    if coverage_configuration is not None:
        os.environ["COVERAGE_PROCESS_START"] = str(coverage_configuration)  # for processes that tests start
        coverage.process_startup()
    # The imported libraries include plugins of pytest, whose assertions need no rewriting.
    warning = "-Wignore::pytest.PytestAssertRewriteWarning"
    code = pytest.main(["-x", "-q", warning, *tests], [_FirstFailure(report)])
    os._exit(int(code))
