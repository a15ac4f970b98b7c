"""Builds the unchanged Dockerfile with buildah; Debian and this Python stand in for the pinned base images."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.container.image.command import ImageError, run

ROOT = Path(__file__).parents[3]
TAG = "localhost/llama2-grpc:image-test"
# PATH of the official Python images.
BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Libraries of Python's own modules.
LIBRARIES = "ca-certificates,libbz2-1.0,libffi8,liblzma5,libncursesw6,libreadline8,libsqlite3-0,libssl3,libuuid1,zlib1g"
# Parts of a Python installation that a server does not need; the official images do not have its tests either.
NOT_IN_PYTHON = ("__pycache__", "config-*", "idlelib", "site-packages", "test", "tests", "tkinter", "turtledemo")
# Debian's slim images leave these out, too.
NOT_IN_SLIM = (
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "var/cache/apt",
    "var/lib/apt/lists",
)


@dataclass(frozen=True)
class Buildah:
    """buildah with its own storage in a folder, so that it does not touch the images of this machine."""

    storage: Path

    def __call__(self, *arguments: str) -> str:
        """Run a command of buildah and return its output without the line end.

        Raises:
            ImageError: the command failed.
        """
        options = [f"--root={self.storage / 'root'}", f"--runroot={self.storage / 'run'}"]
        return run(["buildah", *options, *arguments]).strip()

    def remove(self) -> None:
        """Remove all containers and images, and the storage."""
        if self.storage.exists():
            self("rm", "--all")
            self("rmi", "--all", "--force")
            layers = self.storage / "root" / "overlay"
            if layers.is_mount():  # buildah mounts it over itself
                run(["umount", str(layers)])
            shutil.rmtree(self.storage)


@dataclass(frozen=True)
class Bases:
    """The base images of the Dockerfile in the order of its stages, and the Debian release that both have."""

    names: tuple[str, ...]
    release: str

    @classmethod
    def read(cls, dockerfile: Path = ROOT / "Dockerfile") -> "Bases":
        """Read the bases from the FROM instructions.

        Raises:
            ValueError: a base is not an official Python image for Debian.
        """
        names = tuple(re.findall(r"^FROM (\S+)", dockerfile.read_text(encoding="utf-8"), re.MULTILINE))
        releases = {found[1] for name in names if (found := re.match(r"python:[\d.]+-(?:slim-)?(\w+)@", name))}
        if len(releases) != 1:
            raise ValueError(f"{dockerfile}: expected official Python images of one Debian release, got {names}")
        return cls(names, *releases)


def make_bases(buildah: Buildah, release: str, mirror: str, work: Path) -> tuple[str, str]:
    """Make the images that stand in for the bases, and return their names: with a compiler, and slim.

    Images of an earlier call are used again.

    Args:
        buildah: the storage of the images.
        release: Debian release of the bases.
        mirror: URL of a Debian mirror.
        work: folder for the files of the slim image, which are removed at the end.
    """
    names = ("localhost/stand-in-build", "localhost/stand-in-slim")
    if f"{names[0]}:latest" in buildah("images", "--format={{.Name}}:{{.Tag}}").split():
        return names
    tree = work / "base"
    if tree.exists():
        shutil.rmtree(tree)
    run(["debootstrap", "--variant=minbase", f"--include={LIBRARIES}", release, str(tree), mirror])
    for name in NOT_IN_SLIM:
        shutil.rmtree(tree / name)
    _install_python(tree)
    slim = buildah("from", "scratch")
    buildah("add", slim, str(tree), "/")
    shutil.rmtree(tree)
    buildah("config", "--env", f"PATH={BASE_PATH}", "--env", "LANG=C.UTF-8", slim)
    buildah("commit", "--rm", slim, names[1])
    build = buildah("from", names[1])
    packages = "apt-get update && apt-get install --yes --no-install-recommends g++ libc6-dev"
    buildah("run", "--isolation=chroot", build, "--", "sh", "-c", packages)
    buildah("commit", "--rm", build, names[0])
    return names


def _install_python(tree: Path) -> None:
    """Copy this program's Python to /usr/local, where the official images have theirs.

    Debian's own has an older patch version, which needs a package that the lock file does not have.
    """
    source, version = Path(sys.base_prefix), f"python{sys.version_info.major}.{sys.version_info.minor}"
    local = tree / "usr/local"
    ignored = shutil.ignore_patterns(*NOT_IN_PYTHON)
    shutil.copytree(source / "lib" / version, local / "lib" / version, symlinks=True, ignore=ignored)
    (local / "lib" / version / "site-packages").mkdir()
    shutil.copy2(source / "bin" / version, local / "bin" / version)
    for name in ("python", "python3"):
        (local / "bin" / name).symlink_to(version)
    for library in (source / "lib").glob("libpython*.so.*"):
        shutil.copy2(library, local / "lib" / library.name)
    run(["chroot", str(tree), "ldconfig"])


def build(buildah: Buildah, bases: Iterable[tuple[str, str]], options: Iterable[str]) -> None:
    """Build the Dockerfile as TAG; HEALTHCHECK exists only in Docker's image format.

    Args:
        buildah: the storage with the images that replace the bases.
        bases: the name of each base in the Dockerfile, and of the image that replaces it.
        options: additional options of `buildah build`, such as `--build-arg`.
    """
    replaced = [f"--build-context={name}=container-image://{image}" for name, image in bases]
    call = ["--isolation=chroot", "--format=docker", "--layers=false", *replaced, *options, f"--tag={TAG}", str(ROOT)]
    buildah("build", *call)


def pip_volumes(variables: Mapping[str, str] = os.environ) -> list[str]:
    """Return the options that give a build this machine's pip variables and the files that they name, read-only.

    A build argument reaches only the instructions after its ARG, and `--env` would stay in the image.
    """
    named = " ".join(value for name, value in sorted(variables.items()) if name.startswith("PIP_"))
    paths = [word.removeprefix("file://") for word in named.split()]
    return [f"--volume={path}:{path}:ro" for path in paths if path.startswith("/") and Path(path).exists()]


def write_pip_config(path: Path, variables: Mapping[str, str] = os.environ) -> str:
    """Write this machine's pip variables as a configuration file, and return the option that mounts it in a build."""
    options = [(name, value) for name, value in sorted(variables.items()) if name.startswith("PIP_")]
    lines = [f"{name.removeprefix('PIP_').lower().replace('_', '-')} = {value}" for name, value in options]
    path.write_text("\n".join(["[global]", *lines, ""]), encoding="utf-8")
    return f"--volume={path}:/etc/pip.conf:ro"


def configuration(buildah: Buildah) -> dict[str, Any]:
    """Return the configuration of the built image, as `docker inspect` shows it under Config."""
    found: dict[str, Any] = json.loads(buildah("inspect", "--type=image", TAG))["Docker"]["config"]
    if not found:
        raise ImageError(f"{TAG}: the image has no configuration")
    return found
