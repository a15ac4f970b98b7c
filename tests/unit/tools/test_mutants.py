"""The mutations of `make mutants`, its sample, and the tests that it runs."""

import ast
import shutil
from pathlib import Path

import pytest
from tests.support.repository import ROOT
from tools.mutants.executed import FailingTest, fastest_first, measured
from tools.mutants.mutations import mutants
from tools.mutants.runner import first_failure
from tools.mutants.suites import SERVER, TESTS, files_of, modules, package_of

LIMIT_SECONDS = 60
MODULE = '''
LIMIT = 2


class Counter:
    def add(self, number: int = 1) -> bool:
        """Add a number."""
        if self.open and number < LIMIT:
            self.total += number
            self.pairs = zip(self.names, self.values, strict=True)
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
    """Each mutated module belongs to a package with tests, and each pattern of a package finds some."""
    assert {package_of(path) for path in modules(ROOT)} == TESTS.keys()
    patterns = {pattern for of_package in TESTS.values() for pattern in of_package.split()}
    assert [one for one in sorted(patterns) if not list((ROOT / "tests").glob(one))] == []
    assert all(files_of(ROOT, package) for package in TESTS)
    assert not any("cuda" in path.parts for path in modules(ROOT))


def test_tests_run_on_the_copy(tmp_path: Path) -> None:
    """With the repository's settings of pytest, a copy passes whose tests pass, and fails after a change."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    test = tmp_path / "test_one.py"
    test.write_text("def test_one():\n    assert True\n")
    assert first_failure(tmp_path, ["test_one.py"], LIMIT_SECONDS) is None
    test.write_text("def test_one():\n    assert False\n")
    assert first_failure(tmp_path, ["test_one.py"], LIMIT_SECONDS) == "test_one.py::test_one"
    test.write_text("import time\ndef test_one():\n    time.sleep(1000)\n")
    assert first_failure(tmp_path, ["test_one.py"], 0.1) == "time limit"


TWO_FUNCTIONS = """
def executed(number):
    if number > 1:
        return number + 5
    return number


def executed_by_a_process(number):
    return number + 6


def not_executed(number):
    return number + 7
"""
TESTS_OF_TWO_FUNCTIONS = """
import subprocess, sys
from llama2_server.numbers import executed

def test_executed():
    assert executed(2) == 7

def test_process():
    command = "from llama2_server.numbers import executed_by_a_process as f; assert f(1) == 7"
    subprocess.run([sys.executable, "-c", command], check=True)
"""


def test_only_tests_that_execute_a_mutant_are_chosen(tmp_path: Path) -> None:
    """A test file is chosen for the lines that it executes, also in processes that it starts; named ones come first."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    module = SERVER / "numbers.py"
    (tmp_path / SERVER).mkdir(parents=True)
    (tmp_path / SERVER / "__init__.py").touch()
    (tmp_path / module).write_text(TWO_FUNCTIONS)
    (tmp_path / "test_others.py").write_text(TESTS_OF_TWO_FUNCTIONS)
    (tmp_path / "test_numbers.py").write_text(f"{TESTS_OF_TWO_FUNCTIONS}    import time; time.sleep(1)\n")
    (tmp_path / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    paths = ["test_nothing.py", "test_numbers.py", "test_others.py"]
    files = measured(tmp_path, paths, tmp_path / "executed.json", 2)
    chosen = {one.before: [file.path for file in fastest_first(files, one)] for one in mutants(tmp_path, module)}
    # The test that is named after the module comes first, although it is slower.
    both = ["test_numbers.py", "test_others.py"]
    assert chosen["number > 1"] == chosen["number + 5"] == chosen["number + 6"] == both
    assert chosen["number + 7"] == []
    (tmp_path / "test_nothing.py").write_text("def test_nothing():\n    assert False\n")
    with pytest.raises(FailingTest, match=r"test_nothing.py::test_nothing fails without a mutant"):
        measured(tmp_path, paths, tmp_path / "executed.json", 2)
