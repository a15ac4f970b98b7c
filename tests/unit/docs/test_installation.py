"""The project is in no package index, so nothing tells users to install it from one."""

import re
import subprocess

from tests.support.repository import ROOT

FROM_AN_INDEX = re.compile(r"pip install\b[^\n`]*['\" ]llama2-grpc\b")


def test_no_text_installs_the_project_from_an_index() -> None:
    """Documents and messages install a clone (`pip install .`), not the name `llama2-grpc`."""
    listed = subprocess.run(
        ["git", "ls-files", "*.md", "*.py", "*.yaml", "*.toml", "Dockerfile", "Makefile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = [name for name in listed.stdout.splitlines() if name != "tests/unit/docs/test_installation.py"]
    found = [name for name in names if FROM_AN_INDEX.search((ROOT / name).read_text(encoding="utf-8"))]
    assert found == []
    assert FROM_AN_INDEX.search("pip install 'llama2-grpc[otel]'")
    assert "README.md" in names
