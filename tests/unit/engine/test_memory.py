"""The memory that a process can still use, from made files of Linux."""

from pathlib import Path

import pytest

from llama2_server.engine.errors import WeightsError
from llama2_server.engine.memory import MemoryNeed, available_bytes, check_memory

MEMINFO = "MemTotal:       2000 kB\nMemFree:         500 kB\nMemAvailable:   1000 kB\n"


def write(root: Path, **files: str) -> Path:
    """Write files; a double underscore in a name is a slash."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_linux_reports_the_available_memory(tmp_path: Path) -> None:
    """Without control groups, the machine's available memory counts."""
    assert available_bytes(write(tmp_path, proc__meminfo=MEMINFO)) == 1000 * 1024


def test_unknown_systems_have_no_limit(tmp_path: Path) -> None:
    """Without /proc, nothing is known."""
    assert available_bytes(tmp_path) is None


def test_groups_of_version_2_limit_the_memory(tmp_path: Path) -> None:
    """The smallest rest of the own group and the groups above counts; cached files are free memory."""
    root = write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/pod/container\n")
    groups = root / "sys/fs/cgroup"
    for path, limit in (("pod/container", "max"), ("pod", "600000"), (".", "max")):
        (groups / path).mkdir(parents=True, exist_ok=True)
        (groups / path / "memory.max").write_text(f"{limit}\n")
        (groups / path / "memory.current").write_text("400000\n")
        (groups / path / "memory.stat").write_text("anon 300000\ninactive_file 100000\n")
    assert available_bytes(root) == 600000 - 400000 + 100000


def test_groups_of_version_1_limit_the_memory(tmp_path: Path) -> None:
    """In a container, the path of the group may be the host's, and the mount is the own group."""
    root = write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="4:memory:/docker/0123\n1:cpu:/\n")
    mount = root / "sys/fs/cgroup/memory"
    mount.mkdir(parents=True)
    (mount / "memory.limit_in_bytes").write_text("500000\n")
    (mount / "memory.usage_in_bytes").write_text("450000\n")
    (mount / "memory.stat").write_text("total_inactive_file 30000\n")
    assert available_bytes(root) == 80000
    (mount / "memory.usage_in_bytes").write_text("530001\n")  # a group can use more than its limit for a moment
    assert available_bytes(root) == 0


def test_weights_cache_and_reserve_must_fit_together(tmp_path: Path) -> None:
    """One byte too few is rejected; an unknown size is accepted."""
    need = MemoryNeed(weights_bytes=600, cache_bytes=300, tokens="1 x 10 tokens", reserve_bytes=100)
    check_memory(tmp_path, "cpu", need, free_bytes=1000)
    check_memory(tmp_path, "cpu", need, free_bytes=None)
    with pytest.raises(WeightsError, match=r"needs 0\.0 GB on cpu"):
        check_memory(tmp_path, "cpu", need, free_bytes=999)
