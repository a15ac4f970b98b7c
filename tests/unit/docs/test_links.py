"""Links between the Markdown files."""

import re
from pathlib import Path

import pytest
from tests.support.repository import ROOT

FOLDERS = ("docs", "benchmarks", "examples", "helm", "tools", ".github")
PAGES = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_point_to_files(page: Path) -> None:
    """Every relative link of a page points to a file or folder of the repository."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
    targets = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link]
    assert [target for target in targets if not page.parent.joinpath(target).exists()] == []


def test_every_page_of_docs_is_in_the_index() -> None:
    """docs/README.md links to each page next to it."""
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(LINK.findall(index))


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_named_modules_exist(page: str) -> None:
    """Each module or folder in backticks exists in the repository or in the server's package."""
    names = re.findall(r"`((?:[\w.]+/)*(?:\w+\.py|\w+/))`", (ROOT / page).read_text(encoding="utf-8"))
    places = (ROOT, ROOT / "server" / "llama2_server", ROOT / "client" / "llama2_client")
    assert names
    assert [name for name in names if not any((place / name).exists() for place in places)] == []
