"""Write the SBOMs of the container's lock files, and look for known vulnerabilities: `make audit`.

With `--tree`, it also writes the SBOM of an image from its unpacked files.

It exits with 1 if a package has a known vulnerability, or with `--require-database` if no database answers.
"""

import argparse
import sys
import tomllib
from pathlib import Path

from tools.audit.sbom import Lock, bill_of_materials, bill_of_tree
from tools.audit.vulnerabilities import Report, audit

ROOT = Path(__file__).parent.parent.parent
LOCKS = ("server-cpu", "server-cuda")


def main() -> int:
    """Run the audit of the command line, and return the exit code."""
    parser = argparse.ArgumentParser(prog="make audit ARGS=…", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sbom", help="folder of the SBOMs")
    parser.add_argument("--offline", action="store_true", help="only write the SBOMs")
    parser.add_argument("--require-database", action="store_true", help="fail if no vulnerability database answers")
    parser.add_argument("--tree", type=Path, help="folder with the files of an image; its SBOM is image.cdx.json")
    options = parser.parse_args()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tree:
        (options.out / "image.cdx.json").write_text(bill_of_tree(options.tree, version), encoding="utf-8")
    failed = False
    for name in LOCKS:
        path, out = ROOT / "requirements" / f"{name}.lock", options.out / f"{name}.cdx.json"
        out.write_text(bill_of_materials(path, version), encoding="utf-8")
        print(f"{name}: {len(Lock.read(path).versions)} packages, SBOM in {out}")
        if not options.offline:
            report = audit(path)
            print("\n".join(_lines(name, report)))
            failed |= bool(report.vulnerabilities) or (options.require_database and not report.complete)
    return 1 if failed else 0


def _lines(name: str, report: Report) -> list[str]:
    if not report.complete:
        reason = report.error or f"it knows none of the {report.not_audited} packages"
        return [f"{name}: NOT AUDITED: no vulnerability database is reachable: {reason}"]
    counts = f"{len(report.vulnerabilities)} known vulnerabilities in {report.audited} packages"
    unknown = f", {report.not_audited} packages are NOT AUDITED" if report.not_audited else ""
    return [f"{name}: {counts}{unknown}", *(f"  {one}" for one in report.vulnerabilities)]


if __name__ == "__main__":
    sys.exit(main())
