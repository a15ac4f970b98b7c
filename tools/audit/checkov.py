"""Check the chart's manifests and the Dockerfile with checkov: `python -m tools.audit.checkov`.

checkov runs in a separate environment, because it pins other versions of many libraries. Only the failures that
`helm/checkov.yaml` explains are allowed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "helm/llama2"
EXCEPTIONS = ROOT / "helm/checkov.yaml"
ENVIRONMENT = ROOT / ".checkov"
REQUIREMENT = "checkov==3.3.30"


@dataclass(frozen=True)
class Failure:
    """A failed check of a resource."""

    check: str
    name: str
    file: str
    resource: str
    """KIND/NAME of a manifest, or a line of the Dockerfile."""


def write_manifests(folder: Path) -> None:
    """Write the Dockerfile and the manifests of each value set to a folder."""
    shutil.copy(ROOT / "Dockerfile", folder)
    chart = helm_python.Chart.load(CHART)
    for path in sorted((CHART / "ci").glob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        files = chart.render(values, name="llama2", namespace="text")
        texts = [text for name, text in files.items() if not name.endswith("NOTES.txt") and text.strip()]
        (folder / path.name).write_text("\n---\n".join(texts), encoding="utf-8")


def run_checkov(folder: Path) -> list[dict[str, Any]]:
    """Install checkov if it is missing, run it over a folder, and return its reports: one for each kind of file."""
    program = ENVIRONMENT / "bin/checkov"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        subprocess.run([ENVIRONMENT / "bin/python", "-m", "pip", "install", "--quiet", REQUIREMENT], check=True)
    frameworks = ["--framework", "kubernetes", "dockerfile"]
    call: list[str | Path] = [
        program,
        "-d",
        folder,
        *frameworks,
        "--skip-download",
        "--compact",
        "--quiet",
        "--output",
        "json",
    ]
    # Exit code 1 means failed checks; the report lists them.
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=os.environ | {"LOG_LEVEL": "ERROR"})
    try:
        reports = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise RuntimeError(f"checkov printed no report:\n{done.stderr[-2000:]}") from None
    return reports if isinstance(reports, list) else [reports]


def failures(reports: Iterable[dict[str, Any]]) -> Iterator[Failure]:
    """Yield the failed checks of the reports.

    Raises:
        RuntimeError: a file was not read.
    """
    for report in reports:
        if report["summary"]["parsing_errors"]:
            raise RuntimeError(f"checkov could not read {report['results']['parsing_errors']}")
        for found in report["results"]["failed_checks"]:
            # KIND.NAMESPACE.NAME, and for the pods of a template also their labels.
            kind, _, name = [*found["resource"].split("."), "", ""][:3]
            yield Failure(
                found["check_id"], found["check_name"], found["file_path"], f"{kind}/{name}" if name else kind
            )


def violations(found: Iterable[Failure], exceptions: list[dict[str, str]]) -> list[str]:
    """Return a line for each failure without an exception, and for each exception without a failure."""
    unused = list(exceptions)
    lines = []
    for failure in found:
        matching = [
            entry
            for entry in exceptions
            if entry["check"] == failure.check and re.fullmatch(entry["resources"], failure.resource)
        ]
        unused = [entry for entry in unused if entry not in matching]
        if not matching:
            lines.append(f"{failure.file}: {failure.resource}: {failure.check}: {failure.name}")
    return lines + [f"{EXCEPTIONS.name}: {entry['check']}: no resource fails it; remove the entry" for entry in unused]


def main() -> None:
    """Print the violations; exit with 1 if there are any."""
    with tempfile.TemporaryDirectory() as folder:
        write_manifests(Path(folder))
        reports = run_checkov(Path(folder))
    passed = {report["check_type"]: report["summary"]["passed"] for report in reports}
    lines = violations(failures(reports), yaml.safe_load(EXCEPTIONS.read_text(encoding="utf-8")))
    print("\n".join(lines) or f"checkov: no unexplained failures; passed checks: {passed}")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
