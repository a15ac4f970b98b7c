"""Write the lock files of the container: every dependency in its exact version, with the hashes of its files.

    make lock                               write them, after a change in pyproject.toml or constraints.txt
    python -m tools.container.lock --check  list, offline, the entries that do not match those two files

`requirements/build.lock` contains the build dependencies of our package. `server-cpu.lock` and `server-cuda.lock`
contain the dependencies of the server: every extra except `dev`, `bench` and `conformance`, for the Python of the
Dockerfile on x86-64 Linux. constraints.txt determines the versions. Packages that it does not name keep their version
in the lock file; delete the file to get the newest versions.
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
NOT_IN_THE_IMAGE = {"dev", "bench", "conformance"}
RUN_MAKE_LOCK = "run `make lock`"


@dataclass(frozen=True, slots=True)
class Pin:
    """A locked version; it is direct if pyproject.toml requires it."""

    version: Version
    hashes: int
    direct: bool


@dataclass(frozen=True, slots=True)
class Requirements:
    """The requirements in pyproject.toml: of the server in the image with its extras, and of a build."""

    server: list[str]
    extras: list[str]
    build: list[str]

    @classmethod
    def read(cls, root: Path) -> "Requirements":
        """Read the pyproject.toml of a directory."""
        toml = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
        optional: dict[str, list[str]] = toml["project"]["optional-dependencies"]
        extras = [extra for extra in optional if extra not in NOT_IN_THE_IMAGE]
        server = [*toml["project"]["dependencies"], *(line for extra in extras for line in optional[extra])]
        return cls(server, extras, toml["build-system"]["requires"])


class LockError(Exception):
    """The lock files cannot be written; the message contains the reason and the fix."""


def main() -> None:
    """Write or check the lock files; exit with code 1 and the reasons if they are stale or cannot be written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="only check whether the lock files are stale; works offline"
    )
    arguments = parser.parse_args()
    try:
        problems = list(stale_entries()) if arguments.check else write_locks()
    except LockError as error:
        problems = [str(error)]
    if problems:
        sys.exit("\n".join(problems))


def write_locks(root: Path = ROOT) -> list[str]:
    """Write all lock files with uv, and return the stale entries, normally none.

    Raises:
        LockError: uv found no solution, or no CPU build of torch.
    """
    requirements = Requirements.read(root)
    server = ["pyproject.toml", *(f"--extra={extra}" for extra in requirements.extras), "--constraint=constraints.txt"]
    _compile(root, "server-cuda", server)
    _compile(root, "server-cpu", [*server, *_cpu_torch()])
    _compile(root, "build", ["-"], stdin="\n".join(requirements.build))
    if not read_lock(root / "requirements/server-cpu.lock")["torch"].version.local:
        raise LockError(
            "server-cpu.lock: torch is not the CPU build; set PIP_FIND_LINKS to a directory with its wheel, or unset "
            "it to use download.pytorch.org"
        )
    return list(stale_entries(root))


def stale_entries(root: Path = ROOT) -> Iterator[str]:
    """Yield a message for each entry that does not match pyproject.toml and constraints.txt."""
    requirements, constraints = Requirements.read(root), _constraints(root)
    for accelerator in ACCELERATORS:
        yield from _mismatches(root / f"requirements/server-{accelerator}.lock", requirements.server, constraints)
    yield from _mismatches(root / "requirements/build.lock", requirements.build, {})


def read_lock(path: Path) -> dict[str, Pin]:
    """Return the pins of a lock file by name."""
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


def _mismatches(lock: Path, lines: list[str], constraints: dict[str, Version]) -> Iterator[str]:
    if not lock.exists():
        yield f"{lock.name}: file does not exist; {RUN_MAKE_LOCK}"
        return
    pins = read_lock(lock)
    required = [(str(canonicalize_name(one.name)), one) for one in map(Requirement, lines) if _applies(one)]
    for name, requirement in required:
        if name not in pins:
            yield f"{lock.name}: pyproject.toml requires {requirement}, which is not locked; {RUN_MAKE_LOCK}"
        elif not requirement.specifier.contains(pins[name].version, prereleases=True):
            version = pins[name].version
            yield f"{lock.name}: {name} {version} does not match {requirement} in pyproject.toml; {RUN_MAKE_LOCK}"
    for name, pin in pins.items():
        if pin.direct and name not in dict(required):
            yield f"{lock.name}: pyproject.toml does not require {name}; {RUN_MAKE_LOCK}"
        if name in constraints and constraints[name].public != pin.version.public:
            yield f"{lock.name}: {name} {pin.version} is not {constraints[name]} as in constraints.txt; {RUN_MAKE_LOCK}"
        if not pin.hashes:
            yield f"{lock.name}: {name} has no hash; {RUN_MAKE_LOCK}"


def _applies(requirement: Requirement) -> bool:
    """Return whether a requirement applies in the image; our own extras do not, because they are expanded."""
    full = image_python_version()
    image = {
        "python_version": full.rpartition(".")[0],
        "python_full_version": full,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    own = canonicalize_name(requirement.name) == "llama2-grpc"
    return not own and (requirement.marker is None or requirement.marker.evaluate(dict(image)))


def _constraints(root: Path) -> dict[str, Version]:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {str(canonicalize_name(name)): Version(version) for name, _, version in pins}


def _cpu_torch() -> list[str]:
    """Return the uv options for the CPU build of torch: PIP_FIND_LINKS if it is set, otherwise PyTorch's own index."""
    links = os.environ.get("PIP_FIND_LINKS")
    return [f"--find-links={link}" for link in links.split()] if links else ["--torch-backend=cpu"]


def _compile(root: Path, name: str, inputs: list[str], stdin: str = "") -> None:
    call = ["uv", "pip", "compile", *inputs, f"--output-file=requirements/{name}.lock", "--generate-hashes"]
    call += [f"--python-version={image_python_version()}", "--python-platform=x86_64-manylinux_2_28"]
    call += ["--only-binary=:all:", "--no-python-downloads", "--no-config", "--quiet"]
    call += ["--custom-compile-command=make lock"]
    call[0] = str(Path(sys.executable).parent / "uv")
    if subprocess.run(call, cwd=root, input=stdin, text=True, check=False).returncode != 0:
        raise LockError(f"{name}.lock: uv failed; see its message above")


if __name__ == "__main__":
    main()
