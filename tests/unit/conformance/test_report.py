"""The reports of the conformance kit."""

import json
from pathlib import Path
from xml.etree import ElementTree as ET

from conformance.server_runner import report
from conformance.server_runner.run import CaseResult
from conformance.server_runner.suite import StoredCase

RESULTS = [
    CaseResult(StoredCase("text/one", "core", "A rule.", {}), "passed"),
    CaseResult(StoredCase("text/two", "core", "A rule.", {}), "failed", ("text: want 'a', got '\x00'",), 0.5),
    CaseResult(StoredCase("quota/one", "quota", "A rule.", {}), "not claimed"),
    CaseResult(StoredCase("health/one", "health", "A rule.", {}), "known failure", ("code: want OK, got UNKNOWN",)),
]


def test_table() -> None:
    """The table counts the outcomes of each profile, and lists the failed cases with their rules."""
    lines = report.table(RESULTS).splitlines()
    assert lines[0].split("  ")[0] == "profile"
    assert [line.split() for line in lines[1:5]] == [
        ["core", "1", "1", "-", "-", "-"],
        ["quota", "-", "-", "-", "-", "1"],
        ["health", "-", "-", "1", "-", "-"],
        ["all", "1", "1", "1", "-", "1"],
    ]
    assert "failed: text/two: A rule." in lines
    assert not any("known failure: health" in line for line in lines)


def test_json_and_junit(tmp_path: Path) -> None:
    """JSON has every result; in JUnit, failures fail, and known failures and unclaimed profiles are skipped."""
    report.write_json(RESULTS, tmp_path / "report.json")
    rows = json.loads((tmp_path / "report.json").read_text())
    assert [row["outcome"] for row in rows] == ["passed", "failed", "not claimed", "known failure"]
    report.write_junit(RESULTS, tmp_path / "report.xml")
    suite = ET.parse(tmp_path / "report.xml").getroot()  # noqa: S314 - the file above
    assert suite.attrib | {"tests": "4", "failures": "1", "skipped": "2"} == suite.attrib
    kinds = {test.get("name", ""): [child.tag for child in test] for test in suite if test.get("classname") != "quota"}
    assert kinds == {"one": ["skipped"], "two": ["failure"]}
