"""Known vulnerabilities of the packages of a lock file, from pip-audit."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Report:
    """The result for one lock file."""

    audited: int = 0
    """Number of packages that the vulnerability database knows."""
    not_audited: int = 0
    """Number of packages that it does not know."""
    vulnerabilities: tuple[str, ...] = ()
    """One line each: the package, its version, the vulnerability and the versions without it."""
    error: str = ""
    """The reason why the database did not answer."""

    @property
    def complete(self) -> bool:
        """Whether the database knows at least one package. If it knows none, it is not the database of PyPI."""
        return self.audited > 0 and not self.error


def audit(lock: Path) -> Report:
    """Run pip-audit on a lock file."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--disable-pip", "--no-deps"]
    command += ["--format=json", "--progress-spinner=off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Report(error=f"no answer in {TIMEOUT_SECONDS} s")
    try:
        return read_report(json.loads(done.stdout))
    except json.JSONDecodeError:
        return Report(error=(done.stderr.strip().splitlines() or ["no output"])[-1])


def read_report(document: Mapping[str, Any]) -> Report:
    """Return the result that pip-audit wrote as JSON. It reports success also if it found no package at all."""
    audited, not_audited, found = 0, 0, []
    for package in document["dependencies"]:
        if "skip_reason" in package:
            not_audited += 1
            continue
        audited += 1
        for vulnerability in package["vulns"]:
            fixed = ", ".join(vulnerability["fix_versions"]) or "no version"
            found.append(f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}")
    return Report(audited, not_audited, tuple(found))
