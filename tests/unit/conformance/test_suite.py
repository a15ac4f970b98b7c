"""The case files and their abbreviations."""

import json
from pathlib import Path

import pytest
from conformance.server_runner.check import look_up
from conformance.server_runner.suite import SuiteError, load_cases, select
from conformance.server_runner.target import Keys

CASE = {"name": "a", "rule": "A rule.", "steps": [{"generate": {"prompt": "{ab*3} {unique}"}}]}


def write(folder: Path, *cases: object) -> Path:
    """Write a file of cases."""
    (folder / "file.json").write_text(json.dumps({"cases": cases}))
    return folder


def test_texts_are_expanded(tmp_path: Path) -> None:
    """`{ab*3}` is repeated; `{unique}` is another word in each run."""
    (case,) = load_cases(write(tmp_path, CASE))
    assert (case.name, case.profile, case.rule) == ("file/a", "core", "A rule.")
    prompts = {case.expand().steps[0].generate.prompt for _ in range(3)}
    assert len(prompts) == 3
    assert all(prompt.startswith("ababab ") for prompt in prompts)


def test_an_unknown_field_is_rejected(tmp_path: Path) -> None:
    """The error names the file and the case."""
    with pytest.raises(SuiteError, match=r"file\.json: file/a: .*text"):
        load_cases(write(tmp_path, CASE | {"steps": [{"generate": {"text": "hi"}}]}))


def test_names_are_unique(tmp_path: Path) -> None:
    """Two cases with one name are rejected."""
    with pytest.raises(SuiteError, match="file/a"):
        load_cases(write(tmp_path, CASE, CASE))


def test_select(tmp_path: Path) -> None:
    """A pattern selects by the beginning of the name; one that matches nothing is an error."""
    cases = load_cases(write(tmp_path, CASE, CASE | {"name": "b"}))
    assert [case.name for case in select(cases, ["file/b"])] == ["file/b"]
    assert select(cases, []) == cases
    with pytest.raises(SuiteError, match="--case: no case starts with other"):
        select(cases, ["other"])


def test_every_case_has_a_rule() -> None:
    """A rule is one sentence."""
    assert all(len(case.rule) > 10 and case.rule.endswith(".") for case in load_cases())


def test_look_up() -> None:
    """Paths have names and indices; `#` counts elements."""
    document = {"a": {"b": [{"c": 1}, {"c": 2}]}}
    assert look_up(document, "a.b[1].c") == 2
    assert look_up(document, "a.b#") == 2
    assert look_up(document, "a.x") is look_up(document, "a.b[2].c")


def test_accounts_of_one_case(tmp_path: Path) -> None:
    """Each case gets another key of the roles `quota` and `budget`; the other roles have one key."""
    (tmp_path / "keys.json").write_text(json.dumps({"main": "m", "quota": ["q1", "q2"], "budget": ["b"]}))
    keys = Keys.read(tmp_path / "keys.json", None)
    assert [keys.key(role) for role in ("main", "quota", "budget", "quota", "main")] == ["m", "q1", "b", "q2", "m"]
    with pytest.raises(SuiteError, match="no key for the role budget"):
        keys.key("budget")
