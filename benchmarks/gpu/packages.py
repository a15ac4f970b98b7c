"""Puts what the service needs into a folder that travels to a machine without a network: `make gpu-packages`.

torch, transformers and what comes with them are not among it: they are there already, and are what is measured.
"""

import argparse
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
NAMES = (
    *("grpcio", "protobuf", "grpcio-health-checking", "grpcio-reflection", "googleapis-common-protos"),
    *("jsonschema", "jsonschema-specifications", "referencing", "rpds-py", "attrs"),
    *("pydantic", "pydantic_core", "pydantic-settings", "annotated-types", "typing-inspection", "python-dotenv"),
    *("cachetools", "sqlalchemy", "greenlet", "aiosqlite", "alembic", "mako", "prometheus_client", "structlog"),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> None:
    """Parse the flags and fill the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default="3.12", help="the version of the other machine's Python")
    parser.add_argument("--out", type=Path, required=True)
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
    subprocess.run([*command, *pinned()], check=True)


def pinned() -> list[str]:
    """The packages in the versions that the project is tested with."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    versions = {line.partition("==")[0].lower().replace("_", "-"): line for line in lines if "==" in line}
    return [versions[name.lower().replace("_", "-")] for name in NAMES]


if __name__ == "__main__":
    main()
