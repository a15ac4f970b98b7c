"""A machine's own parts that a node would change: the network, kernel settings, logs and mounts.

The test process runs in its own namespaces of the network and of mounts, so all changes disappear with it.
"""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

COMMAND = "unshare --net --mount --pid --fork --kill-child --mount-proc"
ADDRESS = "10.244.0.1"
NETWORK = "10.244.0.0/24"
BRIDGE = "pods"
# The kubelet requires these values, and would set them for the whole machine.
KERNEL_SETTINGS = {
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/keys/root_maxbytes": 25000000,
}
# Folders of containerd, CNI and the kubelet whose paths no option changes.
FIXED_FOLDERS = ("/run", "/var/log", "/var/lib/cni", "/var/lib/kubelet")


def skip_unless_isolated() -> None:
    """Skip the test unless it runs as root and in namespaces whose changes nothing else sees."""
    interfaces = {name for _, name in socket.if_nameindex()}
    if os.geteuid() != 0 or interfaces - {"lo", BRIDGE}:
        pytest.skip(f"NOT TESTED WITH A NODE: run pytest as root in its own namespaces: {COMMAND}")
    for name in ("ip", "mount"):
        if shutil.which(name) is None:
            pytest.skip(f"NOT TESTED WITH A NODE: {name} is not installed")


@contextmanager
def isolated(folder: Path) -> Iterator[None]:
    """Make the network and the mounts of a node for the body of the `with`."""
    skip_unless_isolated()
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "address", "add", f"{ADDRESS}/24", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    run("mount", "--make-rprivate", "/")
    settings = folder / "settings"
    settings.mkdir()
    for number, (name, value) in enumerate(KERNEL_SETTINGS.items()):
        path = settings / str(number)
        path.write_text(f"{value}\n")
        run("mount", "--bind", str(path), f"/proc/sys/{name}")
    for name in FIXED_FOLDERS:
        Path(name).mkdir(parents=True, exist_ok=True)
        run("mount", "-t", "tmpfs", "tmpfs", name)
    try:
        yield
    finally:
        for name in [*FIXED_FOLDERS, *(f"/proc/sys/{setting}" for setting in KERNEL_SETTINGS)]:
            run("umount", "--lazy", name)
        run("ip", "link", "delete", BRIDGE)


def remove_control_groups() -> None:
    """Remove the control groups of containerd that no container uses any more; no namespace hides them."""
    root = Path("/sys/fs/cgroup")
    for group in [root / "k8s.io", *root.glob("*/k8s.io")]:
        for folder, _, _ in os.walk(group, topdown=False):
            with suppress(OSError):  # another containerd uses it
                Path(folder).rmdir()


def unmount_below(folder: Path) -> None:
    """Unmount everything below a folder, the newest mount first."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for point in reversed(points):
        if Path(point).is_relative_to(folder):
            run("umount", "--lazy", point)


def run(*command: str) -> str:
    """Run a command, and return its output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
