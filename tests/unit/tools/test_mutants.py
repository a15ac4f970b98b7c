"""The mutations of `make mutants`, its sample, and the tests that it runs."""

import ast
import shutil
from pathlib import Path

from tests.support.repository import ROOT
from tools.mutants.mutations import mutants
from tools.mutants.runner import first_failure
from tools.mutants.suites import CLOSEST, SERVER, TESTS, closest_first, modules, package_of

MODULE = '''
LIMIT = 2


class Counter:
    def add(self, number: int = 1) -> bool:
        """Add a number."""
        if self.open and number < LIMIT:
            self.total += number
        logger.info("added %d", 1)
        return not self.closed
'''
MUTATIONS = {
    "if self.open and number < LIMIT: -> if not (self.open and number < LIMIT):",
    "self.open and number < LIMIT -> self.open or number < LIMIT",
    "number < LIMIT -> number <= LIMIT",
    "self.total += number -> self.total -= number",
    "self.total += number -> pass",
    "return not self.closed -> return None",
    "not self.closed -> self.closed",
}


def test_mutations_change_one_place(tmp_path: Path) -> None:
    """Each mutation of a function is one change; docstrings, defaults, log calls and module constants stay."""
    (tmp_path / "module.py").write_text(MODULE)
    found = {f"{one.before} -> {one.after}": one for one in mutants(tmp_path, Path("module.py"))}
    assert found.keys() == MUTATIONS
    original = ast.unparse(ast.parse(MODULE)).splitlines()
    for mutant in found.values():
        changed = mutant.source.splitlines()
        assert len(changed) == len(original)
        [different] = [(old, new) for old, new in zip(original, changed, strict=True) if old != new]
        assert mutant.before.rstrip(":") in different[0]
        assert mutant.after.rstrip(":") in different[1]


def test_sample_keeps_the_mutants_of_other_functions(tmp_path: Path) -> None:
    """A change of one function changes neither the mutants nor the order of the others."""
    (tmp_path / "module.py").write_text(MODULE)
    before = {one.order for one in mutants(tmp_path, Path("module.py"))}
    (tmp_path / "module.py").write_text(f"def first(a):\n    return a + 1\n{MODULE}")
    after = {one.order for one in mutants(tmp_path, Path("module.py"))}
    assert before < after


def test_each_module_has_tests() -> None:
    """Each mutated module belongs to a package with tests, and all of them exist."""
    packages = {package_of(path) for path in modules(ROOT)}
    assert packages == TESTS.keys()
    tests = {test for path in modules(ROOT) for test in closest_first(path)}
    assert [test for test in sorted(tests) if not (ROOT / test.partition("::")[0]).exists()] == []
    names = [str(path.relative_to(SERVER)) for path in modules(ROOT)]
    assert [prefix for prefix in CLOSEST if not any(name.startswith(prefix) for name in names)] == []
    assert not any("cuda" in path.parts for path in modules(ROOT))


def test_tests_run_on_the_copy(tmp_path: Path) -> None:
    """With the repository's settings of pytest, a copy passes whose tests pass, and fails after a change."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    test = tmp_path / "test_one.py"
    test.write_text("def test_one():\n    assert True\n")
    assert first_failure(tmp_path, ["test_one.py"]) is None
    test.write_text("def test_one():\n    assert False\n")
    assert first_failure(tmp_path, ["test_one.py"]) == "test_one.py::test_one"
