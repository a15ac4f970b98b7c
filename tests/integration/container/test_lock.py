"""The lock files of the container, and the check for stale ones."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tools.container.lock import ROOT, read_lock, stale_entries

CPU, CUDA = "requirements/server-cpu.lock", "requirements/server-cuda.lock"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the files that the check reads, which a test may change."""
    for name in ("pyproject.toml", "constraints.txt", "requirements"):
        copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copied(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def edit(copy: Path) -> Callable[[str, str, str], list[str]]:
    """Return a function that replaces a text in a file and returns the messages of the check."""

    def edit(name: str, old: str, new: str) -> list[str]:
        text = (copy / name).read_text(encoding="utf-8")
        assert old in text
        (copy / name).write_text(text.replace(old, new, 1), encoding="utf-8")
        return list(stale_entries(copy))

    return edit


def test_lock_files_are_up_to_date() -> None:
    """The lock files match pyproject.toml and constraints.txt; otherwise run `make lock`."""
    assert list(stale_entries()) == []


def test_torch_is_the_right_build() -> None:
    """The CPU lock file has torch's CPU build without CUDA; the CUDA one has PyPI's build with NVIDIA's libraries.

    All other packages are equal.
    """
    cpu, cuda = read_lock(ROOT / CPU), read_lock(ROOT / CUDA)
    assert cpu["torch"].version.local == "cpu"
    assert [name for name in cpu if name.startswith(("nvidia-", "cuda-", "triton"))] == []
    assert cuda["torch"].version.local is None
    assert {"nvidia-cublas", "nvidia-cudnn-cu13", "triton"} <= cuda.keys()
    differing = {name for name in cpu.keys() & cuda.keys() if cpu[name].version != cuda[name].version}
    assert differing == {"torch"}


def test_new_requirement_makes_the_lock_stale(edit: Callable[[str, str, str], list[str]]) -> None:
    """A requirement that is added to an extra must be locked for both accelerators."""
    messages = edit("pyproject.toml", 'redis = ["redis', 'redis = ["hiredis>=3", "redis')
    assert [line.partition(": ")[0] for line in messages] == ["server-cpu.lock", "server-cuda.lock"]
    assert "pyproject.toml requires hiredis>=3, which is not locked; run `make lock`" in messages[0]


def test_new_bound_makes_the_lock_stale(edit: Callable[[str, str, str], list[str]]) -> None:
    """A requirement that excludes the locked version is reported."""
    messages = edit("pyproject.toml", '"click>=8.1,<9"', '"click>=8.1,<8.2"')
    assert "does not match click<8.2,>=8.1 in pyproject.toml" in messages[0]


def test_dropped_requirement_makes_the_lock_stale(edit: Callable[[str, str, str], list[str]]) -> None:
    """A locked package that pyproject.toml no longer requires is reported."""
    messages = edit("pyproject.toml", '"click>=8.1,<9",', "")
    assert "pyproject.toml does not require click;" in messages[0]


def test_other_constraint_makes_the_lock_stale(edit: Callable[[str, str, str], list[str]]) -> None:
    """A version that differs from constraints.txt is reported, because the image has the tested versions."""
    (pin,) = (line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line.startswith("tqdm=="))
    assert "is not 4.0 as in constraints.txt" in edit("constraints.txt", pin, "tqdm==4.0")[0]


def test_build_requirement_makes_the_lock_stale(edit: Callable[[str, str, str], list[str]]) -> None:
    """The build requirements are locked, too."""
    (message,) = edit("pyproject.toml", 'requires = ["hatchling==1.33.0"', 'requires = ["hatchling==1.32.0"')
    assert message.startswith("build.lock: hatchling")


def test_missing_lock_is_reported(copy: Path) -> None:
    """A missing lock file is reported by name."""
    (copy / CUDA).unlink()
    assert list(stale_entries(copy)) == ["server-cuda.lock: file does not exist; run `make lock`"]


def test_pin_without_a_hash_is_reported(copy: Path) -> None:
    """Every pin has hashes; otherwise pip would reject the file later, during a build."""
    text = (copy / CPU).read_text(encoding="utf-8")
    (copy / CPU).write_text(re.sub(r"(alembic==\S+)( \\\n +--hash=\S+)+", r"\1", text), encoding="utf-8")
    assert list(stale_entries(copy)) == ["server-cpu.lock: alembic has no hash; run `make lock`"]
