"""The systemd service of docs/systemd.md."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.support.repository import ROOT

from llama2_server.cli.exit import EXIT_INVALID
from llama2_server.config.settings import Settings

UNIT = ROOT / "examples/systemd/llama2-server.service"
PAGE = ROOT / "docs/systemd.md"
# systemd's own rating in tenths: 14 with systemd 252. Later versions rate more options.
MAX_EXPOSURE = 20


def values(name: str) -> list[str]:
    """Return the values of an option of the unit."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture
def systemd_analyze() -> str:
    """The program that checks units."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("NOT TESTED WITH SYSTEMD: it is not installed (Debian: apt-get install systemd)")
    return program


def test_systemd_accepts_the_unit(systemd_analyze: str, tmp_path: Path) -> None:
    """`systemd-analyze verify` finds nothing to report; the program has a path that exists here."""
    unit = tmp_path / UNIT.name
    [program] = values("ExecStart")
    unit.write_text(UNIT.read_text(encoding="utf-8").replace(program, "/bin/true"), encoding="utf-8")
    result = subprocess.run([systemd_analyze, "verify", str(unit)], capture_output=True, text=True, check=False)
    # Other units of the machine may have warnings, and a container has no running systemd.
    assert [line for line in (result.stdout + result.stderr).splitlines() if UNIT.stem in line] == []
    assert result.returncode == 0


def test_the_unit_is_hardened(systemd_analyze: str) -> None:
    """The rating of systemd is low."""
    arguments = ["security", "--offline=true", f"--threshold={MAX_EXPOSURE}", "--no-pager", str(UNIT)]
    result = subprocess.run([systemd_analyze, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_unit_agrees_with_the_server() -> None:
    """Its variables are settings, and its exit codes and its timeout agree with the server."""
    names = {text.partition("=")[0] for text in values("Environment")}
    prefix = "LLAMA2_"
    settings = {name.removeprefix(prefix).lower() for name in names if name.startswith(prefix)}
    assert settings <= set(Settings.model_fields) | {"config"}
    assert values("RestartPreventExitStatus") == [str(EXIT_INVALID)]
    assert values("SuccessExitStatus") == ["143"]
    assert int(values("TimeoutStopSec")[0]) >= Settings.model_fields["shutdown_grace_seconds"].default + 10


def test_the_page_names_the_directories_of_the_unit() -> None:
    """The installation on the page and the unit use the same paths and account."""
    page = PAGE.read_text(encoding="utf-8")
    [program] = values("ExecStart")
    paths = [program.rpartition("/bin/")[0], *(text.partition("=")[2] for text in values("Environment"))]
    paths += [path.removeprefix("-") for path in values("EnvironmentFile")]
    for path in paths:
        assert path.removesuffix("/huggingface") in page
    assert f"nologin {values('User')[0]}" in page
