"""Download the service's packages and matplotlib for a machine without a network: `make gpu-packages`.

torch, transformers and their dependencies are not included: they are already installed there, and are measured.
"""

import argparse
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
PACKAGES = (
    *("grpcio", "protobuf", "grpcio-health-checking", "grpcio-reflection", "googleapis-common-protos"),
    *("jsonschema", "jsonschema-specifications", "referencing", "rpds-py", "attrs"),
    *("pydantic", "pydantic_core", "pydantic-settings", "annotated-types", "typing-inspection", "python-dotenv"),
    *("cachetools", "sqlalchemy", "greenlet", "alembic", "mako", "prometheus_client", "structlog"),
    *(
        "matplotlib",
        "contourpy",
        "cycler",
        "fonttools",
        "kiwisolver",
        "pillow",
        "pyparsing",
        "python-dateutil",
        "tzdata",
    ),
)
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
    subprocess.run([*command, *pinned_requirements()], check=True)


def pinned_requirements() -> list[str]:
    """Return the packages, pinned to the versions in constraints.txt."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    versions = {line.partition("==")[0].lower().replace("_", "-"): line for line in lines if "==" in line}
    return [versions[name.lower().replace("_", "-")] for name in PACKAGES]


if __name__ == "__main__":
    main()
