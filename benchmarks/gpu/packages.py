"""Download the service's packages for a machine without a network: `make gpu-packages`.

torch, transformers and their dependencies are not included: they are already installed there, and are measured. Nor is
matplotlib: `python -m benchmarks.gpu --merge` draws the chart elsewhere.
"""

import argparse
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
PROJECT = "llama2-grpc"
# The other machine has these, with all dependencies.
INSTALLED_THERE = ("torch", "transformers", "triton", "sentencepiece", "jinja2")
ALWAYS = ("pydantic", "pytest")  # only some versions of transformers need the first
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> None:
    """Parse the flags and download the packages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default="3.12", help="Python version of the other machine.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the packages.")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--no-compile"]
    command += [
        "--upgrade",
        "--target",
        str(arguments.out),
        "--python-version",
        arguments.python,
        "--implementation",
        "cp",
    ]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *pinned_requirements(arguments.python)], check=True)
    copy_metadata(arguments.out)


def pinned_requirements(python: str) -> list[str]:
    """Return what the service needs beyond INSTALLED_THERE, pinned to the versions in constraints.txt."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    versions = {canonicalize_name(line.partition("==")[0]): line for line in lines if "==" in line}
    there = set[NormalizedName]().union(*(dependencies(name, python) for name in INSTALLED_THERE))
    needed = dependencies(f"{PROJECT}[server]", python) - there - {canonicalize_name(PROJECT)}
    always = set[NormalizedName]().union(*(dependencies(name, python) for name in ALWAYS))
    needed |= always - dependencies("torch", python)
    return sorted(versions[name] for name in needed)


def dependencies(requirement: str, python: str) -> set[NormalizedName]:
    """Return a package and all that it needs, by the metadata of the installed packages."""
    root = Requirement(requirement)
    found, pending = set[NormalizedName](), [(canonicalize_name(root.name), frozenset({"", *root.extras}))]
    visited = set(pending)
    while pending:
        name, extras = pending.pop()
        found.add(name)
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # such as triton, which a CPU build of torch does not need
            continue
        for needed in map(Requirement, requires):
            environments = (
                {"python_version": python, "python_full_version": f"{python}.0", "extra": e} for e in extras
            )
            if needed.marker is None or any(needed.marker.evaluate(environment) for environment in environments):
                step = (canonicalize_name(needed.name), frozenset({"", *needed.extras}))
                if step not in visited:
                    visited.add(step)
                    pending.append(step)
    return found


def copy_metadata(out: Path) -> None:
    """Copy the metadata of this project, by which the service knows its version; its code is in the working tree."""
    installed = metadata.distribution(PROJECT)
    folder = out / f"llama2_grpc-{installed.version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(installed.read_text("METADATA") or "", encoding="utf-8")


if __name__ == "__main__":
    main()
