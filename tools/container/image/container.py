"""Runs an image under runc: a read-only root, no capabilities, and no network except its own loopback."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.container.image.command import ImageError, run
from tools.container.image.seccomp import runtime_profile

CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
# The defaults of Docker and containerd.
MASKED = ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
          "/proc/sched_debug", "/proc/scsi", "/sys/firmware"]  # fmt: skip
READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
SAFE = ["nosuid", "noexec", "nodev"]
MOUNTS = [
    {"destination": "/proc", "type": "proc", "source": "proc", "options": SAFE},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755"]},
    {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance"]},
    {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": [*SAFE, "mode=1777", "size=64m"]},  # noqa: S108
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*SAFE, "ro"]},
]  # fmt: skip


@dataclass(frozen=True)
class Bundle:
    """The files that runc needs, in a folder: its configuration, the volume of the container, and runc's own state."""

    folder: Path

    @classmethod
    def write(
        cls, folder: Path, root: Path, image: Mapping[str, Any], profile: Path, variables: Mapping[str, str]
    ) -> "Bundle":
        """Write the bundle of a container.

        Args:
            folder: an empty or missing folder.
            root: the files of the image.
            image: the configuration of the image.
            profile: seccomp profile in the format of Docker and Podman.
            variables: additional environment variables of the container.
        """
        bundle = cls(folder)
        bundle.volume.mkdir(parents=True)
        (mounted_at,) = image["Volumes"]
        mount_point = (root / mounted_at.lstrip("/")).stat()
        # A new volume gets the owner and the mode of its mount point, as in Docker.
        os.chown(bundle.volume, mount_point.st_uid, mount_point.st_gid)
        bundle.volume.chmod(mount_point.st_mode)
        volume = {"destination": mounted_at, "type": "bind", "source": str(bundle.volume), "options": ["bind", "rw"]}
        seccomp = runtime_profile(json.loads(profile.read_text(encoding="utf-8")))
        document = specification(root, image, [volume], seccomp, variables)
        (folder / "config.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
        return bundle

    @property
    def volume(self) -> Path:
        """The folder that is mounted as the container's volume."""
        return self.folder / "volume"

    def runc(self, *arguments: str) -> list[str]:
        """Return a command of runc with its state in the bundle."""
        return ["runc", f"--root={self.folder / 'state'}", *arguments]

    def remove(self) -> None:
        """Remove all files of the bundle."""
        shutil.rmtree(self.folder)


def specification(
    root: Path,
    image: Mapping[str, Any],
    volumes: list[dict[str, Any]],
    seccomp: Mapping[str, Any],
    variables: Mapping[str, str],
) -> dict[str, Any]:
    """Return the configuration of runc that Docker makes with --read-only, --cap-drop ALL and --network none."""
    user, _, group = image["User"].partition(":")
    process = {
        "terminal": False,
        "user": {"uid": int(user), "gid": int(group)},
        "args": image["Entrypoint"],
        "env": [*image["Env"], *(f"{name}={value}" for name, value in variables.items())],
        "cwd": image["WorkingDir"],
        "capabilities": {kind: [] for kind in CAPABILITY_SETS},
        "noNewPrivileges": True,
    }
    linux = {
        "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
        "maskedPaths": MASKED,
        "readonlyPaths": READ_ONLY,
        "seccomp": seccomp,
    }
    return {
        "ociVersion": "1.0.2",
        "process": process,
        "root": {"path": str(root), "readonly": True},
        "hostname": "llama2",
        "mounts": [*MOUNTS, *volumes],
        "linux": linux,
    }


@dataclass(frozen=True)
class Container:
    """A running container."""

    bundle: Bundle
    name: str
    process: "subprocess.Popen[str]"

    def exec(self, *command: str) -> str:
        """Run a command in the container, and return its output.

        Raises:
            ImageError: the command failed.
        """
        return run(self.bundle.runc("exec", self.name, *command))

    def status(self, name: str) -> str:
        """Return a field of the kernel's status of process number 1."""
        state = json.loads(run(self.bundle.runc("state", self.name)))
        lines = Path(f"/proc/{state['pid']}/status").read_text(encoding="utf-8").splitlines()
        (value,) = (line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))
        return value

    def stop(self, signal: str) -> int:
        """Send a signal to process number 1, and return the exit code of the container."""
        run(self.bundle.runc("kill", self.name, signal))
        return self.process.wait(timeout=60)


@contextmanager
def running(bundle: Bundle, name: str) -> Iterator[Container]:
    """Run the container; yield it when it serves.

    Raises:
        ImageError: it ended before it served.
    """
    call = bundle.runc("run", f"--bundle={bundle.folder}", name)
    log = bundle.folder / "log"
    with log.open("w") as errors, subprocess.Popen(call, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line.startswith("SERVING on "):
                raise ImageError(f"the container does not serve: {line}{log.read_text(encoding='utf-8')}")
            yield Container(bundle, name, process)
        finally:
            if process.poll() is None:
                subprocess.run(bundle.runc("kill", name, "KILL"), capture_output=True, check=False)
