"""Runs of `make bench-gpu`: what is written, and when."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu import __main__ as runs
from benchmarks.gpu.packages import dependencies, pinned_requirements
from benchmarks.gpu.part_process import PartFailed
from benchmarks.gpu.parts import ABOUT_LIMIT_SECONDS, PARTS
from benchmarks.gpu.target import Target
from tests.support.repository import ROOT

TINY = Target("tiny", "cpu", rows=2)
ABOUT = {"date": "2026-01-02", "shape": "tiny", "processor": "a GPU"}
MAX_RUN_SECONDS = 600
START_SECONDS = 15  # of the program itself, which imports torch and draws the chart
SetParts = Callable[..., list[tuple[str, float]]]


def read(folder: Path) -> dict[str, Any]:
    """Return the results in a folder."""
    (file,) = folder.glob("*.json")
    results: dict[str, Any] = json.loads(file.read_text())
    return results


@pytest.fixture
def set_parts(monkeypatch: pytest.MonkeyPatch) -> SetParts:
    """Return a function that replaces the processes of parts by generators, and returns a list of their limits."""

    def set_parts(**parts: Callable[[], Iterator[tuple[str, Any]]]) -> list[tuple[str, float]]:
        limits: list[tuple[str, float]] = []
        parts["about"] = lambda: iter([("about", ABOUT)])

        def part_results(part: str, target: Target, limit_seconds: float) -> Iterator[tuple[str, Any]]:
            limits.append((part, limit_seconds))
            return parts[part]()

        monkeypatch.setattr(runs, "part_results", part_results)
        return limits

    return set_parts


def test_results_are_written_after_each_measurement(tmp_path: Path, set_parts: SetParts) -> None:
    """A part that fails is recorded with its error; what was measured before and after it stays."""
    seen: list[dict[str, Any]] = []

    def first() -> Iterator[tuple[str, Any]]:
        yield "first", 1
        seen.append(read(tmp_path))
        raise PartFailed("ended at its time limit of 20 s")

    def second() -> Iterator[tuple[str, Any]]:
        seen.append(read(tmp_path))
        yield "second", 2

    set_parts(engine=first, fused=second)
    results, path = runs.measure(TINY, ["engine", "fused"], tmp_path)
    assert [set(results) - {"about", "seconds", "failures"} for results in seen] == [{"first"}, {"first"}]
    assert set(seen[1]["failures"]) == {"engine"}
    assert results == read(tmp_path)
    assert (results["first"], results["second"]) == (1, 2)
    assert results["failures"] == {"engine": "ended at its time limit of 20 s"}
    assert path.parent == tmp_path


def test_a_further_run_adds_its_parts(tmp_path: Path, set_parts: SetParts) -> None:
    """The results of an earlier run on the same machine stay; a part that now succeeds is no failure any more."""

    def failing() -> Iterator[tuple[str, Any]]:
        raise PartFailed("no")

    set_parts(engine=failing, fused=lambda: iter([("b", 2)]))
    runs.measure(TINY, ["engine", "fused"], tmp_path)
    set_parts(engine=lambda: iter([("a", 1)]))
    results, _ = runs.measure(TINY, ["engine"], tmp_path)
    assert (results["a"], results["b"], results["failures"]) == (1, 2, {})
    assert set(results["seconds"]) == {"engine", "fused"}


def test_each_part_has_its_time_limit(tmp_path: Path, set_parts: SetParts) -> None:
    """A slow machine multiplies all of them."""
    limits = set_parts(profile=lambda: iter([]), loading=lambda: iter([]))
    runs.measure(TINY, ["profile", "loading"], tmp_path, limit_factor=3.0)
    parts = [("about", ABOUT_LIMIT_SECONDS), *((name, PARTS[name].limit_seconds) for name in ("profile", "loading"))]
    assert limits == [(name, 3 * seconds) for name, seconds in parts]


def test_each_documented_run_ends_within_ten_minutes() -> None:
    """The commands of the README measure each part once, and their time limits leave room for the program's start.

    The first two have every measurement, and the profile before the other libraries.
    """
    readme = (ROOT / "benchmarks/gpu/README.md").read_text(encoding="utf-8")
    commands = [found.split(",") for found in re.findall(r"--parts ([\w,]+) --out", readme)]
    for parts in commands:
        seconds = START_SECONDS + ABOUT_LIMIT_SECONDS + sum(PARTS[part].limit_seconds for part in parts)
        assert seconds <= MAX_RUN_SECONDS, parts
    table = re.findall(r"^\| `(\w+)` \|.*\| (\d+) s \|$", readme, re.MULTILINE)
    assert table == [(name, str(part.limit_seconds)) for name, part in PARTS.items()]
    assert [part for parts in commands for part in parts] == list(PARTS)
    assert commands[2:] == [["sanitizer"]]
    order = list(PARTS)
    assert order.index("profile") < order.index("transformers") < order.index("compiled")


def test_a_machine_without_a_gpu_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written."""

    def failing(*_: object) -> Iterator[tuple[str, Any]]:
        raise PartFailed("--device cuda: torch finds no GPU")
        yield

    monkeypatch.setattr(runs, "part_results", failing)
    with pytest.raises(SystemExit, match="torch finds no GPU"):
        runs.measure(TINY, ["engine"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_runs_of_one_machine_are_merged() -> None:
    """Each part is the one of the last run that measured it."""
    about = ABOUT | {"shape": "7b"}
    first = {"about": about, "seconds": {"a": 1, "b": 1}, "failures": {"a": "Error"}, "b": 1}
    second = {"about": about | {"date": "2026-01-03"}, "seconds": {"a": 2}, "failures": {}, "a": 2}
    both = runs.merged([first, second])
    assert both == {"about": second["about"], "seconds": {"a": 2, "b": 1}, "failures": {}, "a": 2, "b": 1}
    with pytest.raises(SystemExit, match="different machines"):
        runs.merged([first, second | {"about": about | {"processor": "another GPU"}}])


def test_a_part_is_chosen_by_its_name() -> None:
    """--parts keeps the given order, and rejects an unknown part with the list of all."""
    assert runs._parts("transformers,ceilings") == ["transformers", "ceilings"]
    with pytest.raises(Exception, match=f"no part speed; choose from {', '.join(PARTS)}"):
        runs._parts("ceilings,speed")


def test_packages_are_pinned_to_the_tested_versions() -> None:
    """The carried packages are those of the service without those of torch and transformers, each with its version."""
    requirements = pinned_requirements("3.12")
    names = {requirement.partition("==")[0] for requirement in requirements}
    assert {"grpcio", "sqlalchemy", "structlog", "pydantic", "pydantic-core", "pytest"} <= {
        name.replace("_", "-") for name in names
    }
    assert not names & (dependencies("torch", "3.12") | {"transformers", "numpy", "triton", "matplotlib"})
