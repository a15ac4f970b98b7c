"""Runs of `make bench-gpu`: what is written, and when."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu import __main__ as runs
from benchmarks.gpu.packages import dependencies, pinned_requirements
from benchmarks.gpu.parts import PARTS, Target

TINY = Target("tiny", "cpu", rows=2)


def read(folder: Path) -> dict[str, Any]:
    """Return the results in a folder."""
    (file,) = folder.glob("*.json")
    results: dict[str, Any] = json.loads(file.read_text())
    return results


def test_results_are_written_after_each_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that fails, even by an exit, is recorded with its error; what was measured before and after it stays."""
    seen: list[dict[str, Any]] = []

    def first(target: Target) -> Iterator[tuple[str, Any]]:
        yield "first", 1
        seen.append(read(tmp_path))
        raise SystemExit("the server did not start")

    def second(target: Target) -> Iterator[tuple[str, Any]]:
        seen.append(read(tmp_path))
        yield "second", 2

    monkeypatch.setattr(runs, "PARTS", {"first": first, "second": second})
    results, path = runs.measure(TINY, ["first", "second"], tmp_path)
    assert [set(results) - {"about", "seconds", "failures"} for results in seen] == [{"first"}, {"first"}]
    assert set(seen[1]["failures"]) == {"first"}
    assert results == read(tmp_path)
    assert (results["first"], results["second"]) == (1, 2)
    assert results["failures"]["first"].endswith("SystemExit: the server did not start\n")
    assert path.parent == tmp_path


def test_a_further_run_adds_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results of an earlier run on the same machine stay; a part that now succeeds is no failure any more."""
    monkeypatch.setattr(runs, "PARTS", {"a": lambda target: iter([("a", 1 / 0)]), "b": lambda target: iter([("b", 2)])})
    runs.measure(TINY, ["a", "b"], tmp_path)
    monkeypatch.setattr(runs, "PARTS", {"a": lambda target: iter([("a", 1)])})
    results, _ = runs.measure(TINY, ["a"], tmp_path)
    assert (results["a"], results["b"], results["failures"]) == (1, 2, {})
    assert set(results["seconds"]) == {"a", "b"}


def test_runs_of_one_machine_are_merged() -> None:
    """Each part is the one of the last run that measured it."""
    about = {"date": "2026-01-02", "shape": "7b", "processor": "a GPU"}
    first = {"about": about, "seconds": {"a": 1, "b": 1}, "failures": {"a": "Error"}, "b": 1}
    second = {"about": about | {"date": "2026-01-03"}, "seconds": {"a": 2}, "failures": {}, "a": 2}
    both = runs.merged([first, second])
    assert both == {"about": second["about"], "seconds": {"a": 2, "b": 1}, "failures": {}, "a": 2, "b": 1}
    with pytest.raises(SystemExit, match="different machines"):
        runs.merged([first, second | {"about": about | {"processor": "another GPU"}}])


def test_a_part_is_chosen_by_its_name() -> None:
    """--parts keeps the given order, and rejects an unknown part with the list of all."""
    assert runs._parts("peers,ceilings") == ["peers", "ceilings"]
    with pytest.raises(Exception, match=f"no part speed; choose from {', '.join(PARTS)}"):
        runs._parts("ceilings,speed")


def test_packages_are_pinned_to_the_tested_versions() -> None:
    """The carried packages are those of the service without those of torch and transformers, each with its version."""
    requirements = pinned_requirements("3.12")
    names = {requirement.partition("==")[0] for requirement in requirements}
    assert {"grpcio", "sqlalchemy", "structlog", "pydantic", "pydantic-core"} <= {
        name.replace("_", "-") for name in names
    }
    assert not names & (dependencies("torch", "3.12") | {"transformers", "numpy", "triton", "matplotlib"})
