"""Runs the steps of the Dockerfile without a Docker engine; each stage is an overlay over this machine's root.

Every instruction is read from the Dockerfile, so the two cannot differ. A RUN goes through `/bin/sh -c` in a chroot,
and the overlay stores its writes. The container is equivalent to `docker run --read-only --cap-drop ALL
--network none`: a read-only root, one volume, the Dockerfile's user, environment and entry point, no capabilities, a
network with loopback only, and process number 1.

The base images and their contents are not tested: this machine's root and Python replace them.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration.container.dockerfile import ROOT, Instruction, Stage, context, read_stages
from tools.container.lock import image_python_version

PROGRAMS = ("unshare", "nsenter", "setpriv", "mount", "chroot", "ip")
# PATH of the official images.
BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Runs in a new mount namespace. Arguments: the overlay's upper, work and merged directories, then the command.
ENTER = """
set -eu
merged=$3
mount -t overlay overlay -o "lowerdir=/,upperdir=$1,workdir=$2" "$merged"
shift 3
mount --rbind /dev "$merged/dev"
mount -t proc proc "$merged/proc"
"""
# Additional arguments before the command: the directory of the volume, and its mount point.
SEAL = """
mount -o remount,ro "$merged"
mount --bind "$1" "$merged$2"
shift 2
ip link set lo up
"""
GO = 'exec chroot "$merged" "$@"'


class StepError(Exception):
    """A RUN failed; the message has its output."""


def missing() -> str | None:
    """Return the reason why this machine cannot run the steps, or None if it can."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "the image and its lock files are for x86-64 Linux"
    wanted = image_python_version().rpartition(".")[0]
    if "{}.{}".format(*sys.version_info) != wanted:
        return f"the image has Python {wanted}, this machine has {sys.version_info.major}.{sys.version_info.minor}"
    if os.geteuid() != 0:
        return "only root can mount an overlay; no step of the container was checked"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    with tempfile.TemporaryDirectory() as directory:
        try:
            _base(Path(directory))
        except StepError as error:
            return f"this machine cannot mount an overlay, which is common in containers: {error}"
    return None


@dataclass
class Layer:
    """The files that a stage has written over this machine's root, and its variables."""

    directory: Path
    environment: dict[str, str]
    arguments: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    base: frozenset[Path] = frozenset()

    @property
    def tree(self) -> Path:
        """The directory with the written files."""
        return self.directory / "upper"

    def path_of(self, path: str) -> Path:
        """Return the location of a path of the stage in the tree."""
        return self.tree / (Path(self.workdir) / path).relative_to("/")

    def added(self) -> frozenset[Path]:
        """Return every path that the stage has added to its base."""
        return frozenset(path.relative_to(self.tree) for path in self.tree.rglob("*")) - self.base

    def enter(self, script: str, *arguments: str, network: bool = True) -> list[str]:
        """Return the command that runs a script with the stage as root file system, as process number 1."""
        call = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation=private"]
        call += [] if network else ["--net"]
        parts = [str(self.directory / part) for part in ("upper", "work", "merged")]
        return [*call, "sh", "-c", script, "sh", *parts, *arguments]

    def run(self, *command: str) -> None:
        """Run a command in the stage like a build: as root, with the network and this machine's pip settings.

        Raises:
            StepError: the command failed.
        """
        host_settings = {
            name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_"))
        }
        call = self.enter(ENTER + GO, "env", f"--chdir={self.workdir}", *command)
        variables = host_settings | self.environment | self.arguments
        done = subprocess.run(call, env=variables, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise StepError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


@contextmanager
def built(directory: Path, build_arguments: Mapping[str, str]) -> Iterator["Image"]:
    """Build the image of the Dockerfile; remove all of its files at the end.

    Raises:
        StepError: a step failed.
    """
    try:
        layers: dict[str, Layer] = {}
        for stage in read_stages():
            layers[stage.name or "last"] = layer = _base(directory / str(len(layers)))
            for instruction in stage.instructions:
                _execute(instruction, layer, layers, build_arguments)
        yield Image(stage, layer)
    finally:
        shutil.rmtree(directory)


def _base(directory: Path) -> Layer:
    """Return a layer that replaces a base image; every user can run its Python as `python`."""
    for part in ("upper", "work", "merged"):
        (directory / part).mkdir(parents=True)
    python = Path(sys.base_prefix) / "bin" / "python"
    layer = Layer(directory, {"PATH": f"{python.parent}:{BASE_PATH}", "LANG": "C.UTF-8"})
    layer.run("sh", "-c", f"[ -e {python} ] || ln -s python{sys.version_info.major}.{sys.version_info.minor} {python}")
    layer.run("chmod", "o+x", *(str(parent) for parent in python.parents))
    layer.base = layer.added()
    return layer


def _execute(
    instruction: Instruction, layer: Layer, layers: Mapping[str, Layer], build_arguments: Mapping[str, str]
) -> None:
    variables = layer.environment | layer.arguments
    match instruction.name:
        case "ARG":
            layer.arguments |= instruction.pairs(variables)
            layer.arguments |= {name: value for name, value in build_arguments.items() if name in layer.arguments}
        case "ENV":
            layer.environment |= instruction.pairs(variables)
        case "WORKDIR":
            (layer.workdir,) = instruction.words(variables)
            layer.path_of(".").mkdir(parents=True, exist_ok=True)
        case "RUN":
            layer.run("/bin/sh", "-c", instruction.value)
        case "COPY":
            _copy(instruction.words(variables), layer, layers)


def _copy(words: list[str], layer: Layer, layers: Mapping[str, Layer]) -> None:
    *sources, target = words
    if sources[0].startswith("--from="):
        source = layers[sources[0].removeprefix("--from=")]
        for path in sources[1:]:
            shutil.copytree(
                source.path_of(path), layer.path_of(target), symlinks=True, dirs_exist_ok=True, copy_function=os.link
            )
        return
    for name in sources:
        files = context(name)
        if not files:
            raise StepError(f"COPY {name}: .dockerignore excludes every file with this name")
        for file in files:
            # COPY copies the content of a directory, but a file with its name.
            relative = file.relative_to(name) if file != Path(name) else Path(file.name)
            destination = layer.path_of(target) / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, destination)


@dataclass(frozen=True)
class Image:
    """The last stage, which containers run."""

    stage: Stage
    layer: Layer

    def entry(self, volume: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> list[str]:
        """Return the command of a container: the entry point with arguments, as `docker run` starts it."""
        (mounted_at,) = self.stage.one("VOLUME").words()
        environment = {**self.layer.environment, **(variables or {})}
        user, _, group = self.stage.one("USER").value.partition(":")
        confined = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs"]
        confined += ["--inh-caps=-all", "--bounding-set=-all"]
        command = [*confined, *_env(environment, self.layer.workdir), *self.stage.one("ENTRYPOINT").words(), *arguments]
        return self.layer.enter(ENTER + SEAL + GO, str(volume), mounted_at, *command, network=False)


def _env(environment: Mapping[str, str], workdir: str) -> list[str]:
    return ["env", "-i", f"--chdir={workdir}", *(f"{name}={value}" for name, value in environment.items())]


@dataclass(frozen=True)
class Container:
    """A running container: the process that created its namespaces, and the host's id of its process number 1."""

    image: Image
    outer: "subprocess.Popen[str]"
    first: int

    def exec(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container as `docker exec` does."""
        user, _, group = self.image.stage.one("USER").value.partition(":")
        enter = ["nsenter", f"--target={self.first}", "--mount", "--pid", "--net", "--root", "--wd"]
        enter += ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
        call = [*enter, *_env(self.image.layer.environment, self.image.layer.workdir), *command]
        return subprocess.run(call, capture_output=True, text=True, timeout=120, check=False)

    def status(self, name: str) -> str:
        """Return a field of the status of process number 1."""
        lines = Path(f"/proc/{self.first}/status").read_text(encoding="utf-8").splitlines()
        (value,) = (line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))
        return value


@contextmanager
def running(image: Image, volume: Path, *, variables: Mapping[str, str]) -> Iterator[Container]:
    """Run a container; yield it when it serves."""
    call = image.entry(volume, variables=variables)
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as outer:
        try:
            assert outer.stdout is not None
            line = outer.stdout.readline()
            assert line.startswith("SERVING on "), line
            yield Container(image, outer, *_children(outer.pid))
        finally:
            # The kernel ends all processes of a container when its process number 1 ends.
            for child in _children(outer.pid):
                os.kill(child, signal.SIGKILL)


def _children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in listed.read_text(encoding="utf-8").split()] if listed.exists() else []
