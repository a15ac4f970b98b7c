"""The distribution: its version, and the files of its wheel."""

import re
import tomllib
from pathlib import Path, PurePath

import helm_python
from hatchling.builders.wheel import WheelBuilder
from tests.support.repository import ROOT

VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
IMAGE_TAG = re.compile(r"\bllama2-grpc:v?(\d[\w.]*)")


def test_the_chart_has_the_version_of_the_project() -> None:
    """The image's default tag is the chart's appVersion."""
    assert helm_python.Chart.load(ROOT / "helm/llama2").metadata["appVersion"] == VERSION


def test_image_tags_have_the_version_of_the_project() -> None:
    """In the documentation and in the chart's examples; test_dockerfile.py checks the image's label."""
    folders = ("docs", "helm", "examples")
    files = [ROOT / "README.md", *(file for folder in folders for file in (ROOT / folder).rglob("*.md"))]
    tags = {tag for file in files for tag in IMAGE_TAG.findall(file.read_text(encoding="utf-8"))}
    assert tags == {VERSION}


def test_the_wheel_has_the_packages_and_nothing_else() -> None:
    """Tests, tools and development files stay out; type checkers find the types of client and server."""
    paths = {PurePath(file.distribution_path) for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {path.parts[0] for path in paths} == {"llama2", "llama2_client", "llama2_server"}
    assert {Path("llama2_client/py.typed"), Path("llama2_server/py.typed")} <= paths
    assert Path("llama2/v1/descriptors.pb") in paths  # reflection serves it
