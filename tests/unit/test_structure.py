"""Limits that keep the sources easy to find and to read."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.repository import ROOT

MAX_MODULES = {"server": 10, "client": 10, "conformance": 10, "benchmarks": 10, "tools": 10, "tests": 15}
MAX_FUNCTION_LINES = 50
MAX_LINES = {"README.md": 120, "server/llama2_server/app.py": 150}
MAX_README_WORDS = 900


def modules(folder: str) -> Iterator[Path]:
    """Yield the source files of a top-level folder, without installed packages."""
    for path in (ROOT / folder).rglob("*"):
        installed = {"node_modules", "__pycache__"} & set(path.parts)
        if path.suffix in {".py", ".cpp", ".hpp"} and path.name != "__init__.py" and not installed:
            yield path


@pytest.mark.parametrize("folder", MAX_MODULES)
def test_folders_have_few_modules(folder: str) -> None:
    """A folder with more is split by subject."""
    counts = Counter(path.parent.relative_to(ROOT) for path in modules(folder))
    assert {str(parent): count for parent, count in counts.items() if count > MAX_MODULES[folder]} == {}


@pytest.mark.parametrize("folder", MAX_MODULES)
def test_functions_fit_on_a_screen(folder: str) -> None:
    """A function with more lines, signature and docstring included, is split."""
    long = {}
    for path in modules(folder):
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}: {node.name}"] = lines
    assert long == {}


@pytest.mark.parametrize("file", MAX_LINES)
def test_central_files_stay_short(file: str) -> None:
    """The README and the composition of the service are read from start to end."""
    text = (ROOT / file).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES[file]
    assert file != "README.md" or len(text.split()) <= MAX_README_WORDS
