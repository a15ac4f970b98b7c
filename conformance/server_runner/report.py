"""The results as a table, as JSON and as JUnit's XML."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from conformance.server_runner.run import CaseResult
from conformance.server_runner.suite import PROFILES

OUTCOMES = ("passed", "failed", "known failure", "unexpected pass", "not claimed")


def table(results: Sequence[CaseResult]) -> str:
    """Return one row per profile, and one paragraph per failed case."""
    rows: list[tuple[str, ...]] = [("profile", *OUTCOMES)]
    for profile in PROFILES:
        counts = Counter(result.outcome for result in results if result.case.profile == profile)
        if counts:
            rows.append((profile, *(str(counts[outcome] or "-") for outcome in OUTCOMES)))
    totals = Counter(result.outcome for result in results)
    rows.append(("all", *(str(totals[outcome] or "-") for outcome in OUTCOMES)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for result in results:
        if not result.ok:
            lines += ["", f"{result.outcome}: {result.case.name}: {result.case.rule}", *_indented(result)]
    seconds = sum(result.seconds for result in results)
    return "\n".join([*lines, "", f"{len(results)} cases in {seconds:.1f} s"])


def _indented(result: CaseResult) -> list[str]:
    return [f"    {difference[:400]}" for difference in result.differences]


def write_json(results: Sequence[CaseResult], path: Path) -> None:
    """Write a list of objects with the case, the profile, the rule, the outcome, the differences and the seconds."""
    rows = [
        {
            "case": result.case.name,
            "profile": result.case.profile,
            "rule": result.case.rule,
            "outcome": result.outcome,
            "differences": result.differences,
            "seconds": round(result.seconds, 3),
        }
        for result in results
    ]
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_junit(results: Sequence[CaseResult], path: Path) -> None:
    """Write JUnit's XML: profiles that are not claimed and known failures are skipped tests."""
    suite = ET.Element("testsuite", name="conformance", tests=str(len(results)))
    suite.set("failures", str(sum(not result.ok for result in results)))
    suite.set("skipped", str(sum(result.outcome in {"known failure", "not claimed"} for result in results)))
    for result in results:
        folder, _, name = result.case.name.partition("/")
        test = ET.SubElement(suite, "testcase", classname=folder, name=name, time=f"{result.seconds:.3f}")
        text = "\n".join(_printable(difference) for difference in result.differences)
        if not result.ok:
            ET.SubElement(test, "failure", message=result.outcome).text = text
        elif result.outcome != "passed":
            ET.SubElement(test, "skipped", message=result.outcome).text = text
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def _printable(text: str) -> str:
    """Return text that XML can have: it has no form for most control characters."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else repr(character) for character in text
    )
