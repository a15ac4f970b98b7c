"""The cores that a process can use, from made files of Linux and its real affinity."""

import os
from pathlib import Path

import pytest
from tests.unit.engine.test_memory import write

from llama2_server.engine.control_groups import available_cores


@pytest.fixture(autouse=True)
def affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process may run on eight cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def test_without_quotas_the_affinity_counts(tmp_path: Path) -> None:
    """No control groups, or no limits in them."""
    assert available_cores(tmp_path) == 8
    root = write(tmp_path, proc__self__cgroup="0::/\n")
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/cpu.max").write_text("max 100000\n")
    assert available_cores(root) == 8


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("50000 100000", 1), ("100000 100000", 1), ("250000 100000", 2), ("400000 200000", 2), ("9900000 100000", 8)],
)
def test_a_quota_of_version_2_limits_the_cores(tmp_path: Path, quota: str, cores: int) -> None:
    """Whole cores, at least one; the group above counts, too."""
    root = write(tmp_path, proc__self__cgroup="0::/pod/container\n")
    (root / "sys/fs/cgroup/pod/container").mkdir(parents=True)
    (root / "sys/fs/cgroup/pod/cpu.max").write_text(f"{quota}\n")
    (root / "sys/fs/cgroup/pod/container/cpu.max").write_text("max 100000\n")
    assert available_cores(root) == cores


def test_the_name_of_a_group_may_have_a_colon(tmp_path: Path) -> None:
    """As containerd names them: slice, prefix and container."""
    root = write(tmp_path, proc__self__cgroup="0::/system.slice:cri:0123\n")
    (root / "sys/fs/cgroup/system.slice:cri:0123").mkdir(parents=True)
    (root / "sys/fs/cgroup/system.slice:cri:0123/cpu.max").write_text("200000 100000\n")
    assert available_cores(root) == 2


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("100000", 1), ("350000", 3)])
def test_a_quota_of_version_1_limits_the_cores(tmp_path: Path, quota: str, cores: int) -> None:
    """In a container, the mount is the own group."""
    root = write(tmp_path, proc__self__cgroup="2:cpuacct:/docker/0123\n1:cpu:/docker/0123\n")
    (root / "sys/fs/cgroup/cpu").mkdir(parents=True)
    (root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
    (root / "sys/fs/cgroup/cpu/cpu.cfs_period_us").write_text("100000\n")
    assert available_cores(root) == cores
