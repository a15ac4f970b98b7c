"""The packages that a user of the kit installs."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import conformance

KIT = Path(conformance.__file__).parent
# What `client`, `server --address` and `checkpoint` import; the other commands start this repository's server.
PARTS = ("commands.py", "client_runner/*.py", "server_runner/*.py", "service/*.py")
PACKAGES = {
    "google": "protobuf",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "yaml": "PyYAML",
}
OTHERS = {"conformance", "llama2", "llama2_client"}
LAZY = {"envoy"}
"""Only for this repository's own server."""


def test_the_extra_has_what_the_kit_imports() -> None:
    """The base install and the extra `conformance` have each package that these commands import."""
    project = tomllib.loads((KIT.parent / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["conformance"]]
    installed = {re.split(r"[<>=!~; ]", one)[0].replace("-", "_") for one in requirements}
    imported = set()
    for file in (file for part in PARTS for file in KIT.glob(part)):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported |= {name.partition(".")[0] for name in names}
    imported -= {*sys.stdlib_module_names, *OTHERS, *LAZY}
    needed = {PACKAGES.get(name, name).replace("-", "_") for name in imported}
    assert needed <= installed
    assert {"httpx2", "h2", "cryptography", "numpy", "PyYAML"} <= needed
