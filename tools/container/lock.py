"""The lock files of the container: every dependency in its exact version, with the hashes of its files.

    make lock                               makes them anew, after a change in pyproject.toml or constraints.txt
    python -m tools.container.lock --check  tells, offline, where they do not fit those two any more

`requirements/build.lock` has what builds our package, `server-cpu.lock` and `server-cuda.lock` what the server needs:
every extra but `dev`, for the Python of the Dockerfile on x86-64 Linux, in the versions of constraints.txt where that
names one. What nothing pins keeps the version that it has in the lock file; delete the file for the newest ones.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent.parent
ACCELERATORS = ("cpu", "cuda")
NOT_IN_THE_IMAGE = {"dev", "bench"}
MAKE_AGAIN = "run `make lock`"


@dataclass(frozen=True, slots=True)
class Pin:
    """A locked version; it is direct where pyproject.toml asks for it, not another package."""

    version: Version
    hashes: int
    direct: bool


@dataclass(frozen=True, slots=True)
class Needs:
    """What pyproject.toml requires: of the server in the image, with which extras, and of a build."""

    server: list[str]
    extras: list[str]
    build: list[str]

    @classmethod
    def read(cls, root: Path) -> "Needs":
        """The needs that the pyproject.toml of a directory states."""
        toml = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
        optional: dict[str, list[str]] = toml["project"]["optional-dependencies"]
        extras = [extra for extra in optional if extra not in NOT_IN_THE_IMAGE]
        server = [*toml["project"]["dependencies"], *(line for extra in extras for line in optional[extra])]
        return cls(server, extras, toml["build-system"]["requires"])


class LockError(Exception):
    """The lock files cannot be made; the message says why and what to do."""


def main() -> None:
    """Make the lock files, or check them; exit code 1 with the reasons where they are stale or cannot be made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only tell whether they are stale; needs no network")
    arguments = parser.parse_args()
    try:
        problems = list(stale()) if arguments.check else make()
    except LockError as error:
        problems = [str(error)]
    if problems:
        sys.exit("\n".join(problems))


def make(root: Path = ROOT) -> list[str]:
    """Make all lock files anew with uv; what is still wrong with them, which is nothing.

    Raises:
        LockError: uv found no solution, or not the CPU build of torch.
    """
    needs = Needs.read(root)
    server = ["pyproject.toml", *(f"--extra={extra}" for extra in needs.extras), "--constraint=constraints.txt"]
    _compile(root, "server-cuda", server)
    _compile(root, "server-cpu", [*server, *_cpu_torch()])
    _compile(root, "build", ["-"], given="\n".join(needs.build))
    if not read_lock(root / "requirements/server-cpu.lock")["torch"].version.local:
        raise LockError(
            "server-cpu.lock has not got the CPU build of torch: PIP_FIND_LINKS, which is set, must name a directory "
            "with its wheel; unset it to take it from download.pytorch.org"
        )
    return list(stale(root))


def stale(root: Path = ROOT) -> Iterator[str]:
    """What in the lock files does not fit pyproject.toml and constraints.txt, a sentence for each."""
    needs, constraints = Needs.read(root), _constraints(root)
    for accelerator in ACCELERATORS:
        yield from _misfits(root / f"requirements/server-{accelerator}.lock", needs.server, constraints)
    yield from _misfits(root / "requirements/build.lock", needs.build, {})


def read_lock(path: Path) -> dict[str, Pin]:
    """The pins of a lock file by their names."""
    pins: dict[str, Pin] = {}
    for entry in re.split(r"^(?=\w)", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
        if found := re.match(r"([\w.-]+)==([\w.+!]+)", entry):
            direct = re.search(r"^    #( via|  ) (llama2-grpc \(pyproject\.toml\)|-r -)$", entry, re.MULTILINE)
            pins[canonicalize_name(found[1])] = Pin(
                Version(found[2]), entry.count("--hash=sha256:"), direct is not None
            )
    return pins


def image_python_version() -> str:
    """Return the Python version of the image, from the tag of the Dockerfile's first base image.

    Raises:
        ValueError: the base is not an official Python image.
    """
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    base = re.search(r"^FROM python:(\d+\.\d+\.\d+)-", dockerfile, re.MULTILINE)
    if base is None:
        raise ValueError("Dockerfile: no stage has a base image named python:X.Y.Z-…")
    return base[1]


def _misfits(lock: Path, lines: list[str], constraints: dict[str, Version]) -> Iterator[str]:
    if not lock.exists():
        yield f"{lock.name} is missing; {MAKE_AGAIN}"
        return
    pins = read_lock(lock)
    needs = [(str(canonicalize_name(need.name)), need) for need in map(Requirement, lines) if _applies(need)]
    for name, need in needs:
        if name not in pins:
            yield f"{lock.name}: pyproject.toml requires {need}, which is not locked; {MAKE_AGAIN}"
        elif not need.specifier.contains(pins[name].version, prereleases=True):
            yield f"{lock.name}: {name} {pins[name].version} does not fit pyproject.toml's {need}; {MAKE_AGAIN}"
    for name, pin in pins.items():
        if pin.direct and name not in dict(needs):
            yield f"{lock.name}: pyproject.toml does not require {name} any more; {MAKE_AGAIN}"
        if name in constraints and constraints[name].public != pin.version.public:
            yield f"{lock.name}: {name} {pin.version} is not constraints.txt's {constraints[name]}; {MAKE_AGAIN}"
        if not pin.hashes:
            yield f"{lock.name}: {name} has no hash; {MAKE_AGAIN}"


def _applies(need: Requirement) -> bool:
    """Whether a requirement holds in the image; one on our own extras is spelled out by those."""
    full = image_python_version()
    image = {
        "python_version": full.rpartition(".")[0],
        "python_full_version": full,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    ours = canonicalize_name(need.name) == "llama2-grpc"
    return not ours and (need.marker is None or need.marker.evaluate(dict(image)))


def _constraints(root: Path) -> dict[str, Version]:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {str(canonicalize_name(name)): Version(version) for name, _, version in pins}


def _cpu_torch() -> list[str]:
    """Where uv finds the CPU build of torch: as pip does, in PIP_FIND_LINKS if that is set, else at its makers'."""
    links = os.environ.get("PIP_FIND_LINKS")
    return [f"--find-links={link}" for link in links.split()] if links else ["--torch-backend=cpu"]


def _compile(root: Path, name: str, inputs: list[str], given: str = "") -> None:
    call = ["uv", "pip", "compile", *inputs, f"--output-file=requirements/{name}.lock", "--generate-hashes"]
    call += [f"--python-version={image_python_version()}", "--python-platform=x86_64-manylinux_2_28"]
    call += ["--only-binary=:all:", "--no-python-downloads", "--no-config", "--quiet"]
    call += ["--custom-compile-command=make lock"]
    call[0] = str(Path(sys.executable).parent / "uv")
    if subprocess.run(call, cwd=root, input=given, text=True, check=False).returncode != 0:
        raise LockError(f"uv could not make {name}.lock; its message is above")


if __name__ == "__main__":
    main()
