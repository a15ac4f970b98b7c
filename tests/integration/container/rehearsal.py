"""The Dockerfile's own steps without a Docker engine: each stage is an overlay over this machine's root file system.

Every instruction is read from the Dockerfile, so the two cannot drift apart. A RUN goes through `/bin/sh -c` in a
chroot; what it writes is caught by the overlay. The finished container gets what `docker run --read-only --cap-drop ALL
--network none` gives: a read-only root, one volume, the Dockerfile's user, environment and entry point, no capability,
a network of its own with nothing but loopback, and process number 1.

What is not rehearsed: the base images, for which this machine's root and Python stand in, and so what they hold.
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
# The official images' own.
BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# In a mount namespace of its own: upper, work and merged directory of the overlay, and then the command.
ENTER = """
set -eu
merged=$3
mount -t overlay overlay -o "lowerdir=/,upperdir=$1,workdir=$2" "$merged"
shift 3
mount --rbind /dev "$merged/dev"
mount -t proc proc "$merged/proc"
"""
# And before the command: what lies on the volume, and where that is mounted.
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
    """Why nothing can be rehearsed on this machine; None if it can."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "the image and its lock files are for x86-64 Linux"
    wanted = image_python_version().rpartition(".")[0]
    if "{}.{}".format(*sys.version_info) != wanted:
        return f"the image has Python {wanted}, this is {sys.version_info.major}.{sys.version_info.minor}"
    if os.geteuid() != 0:
        return "only root may mount a root file system of its own; nothing of the container's steps was checked"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    with tempfile.TemporaryDirectory() as directory:
        try:
            _base(Path(directory))
        except StepError as error:
            return f"no overlay can be mounted here, as in many a container: {error}"
    return None


@dataclass
class Layer:
    """What a stage has written so far over this machine's root, and its variables."""

    directory: Path
    environment: dict[str, str]
    arguments: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    base: frozenset[Path] = frozenset()

    @property
    def tree(self) -> Path:
        """The directory with what was written."""
        return self.directory / "upper"

    def at(self, path: str) -> Path:
        """Where a path of the stage lies in the tree."""
        return self.tree / (Path(self.workdir) / path).relative_to("/")

    def added(self) -> frozenset[Path]:
        """Every path that the stage has added to its base."""
        return frozenset(path.relative_to(self.tree) for path in self.tree.rglob("*")) - self.base

    def enter(self, script: str, *arguments: str, network: bool = True) -> list[str]:
        """The command line that runs a script with the stage as its root and itself as process number 1."""
        call = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation=private"]
        call += [] if network else ["--net"]
        parts = [str(self.directory / part) for part in ("upper", "work", "merged")]
        return [*call, "sh", "-c", script, "sh", *parts, *arguments]

    def run(self, *command: str) -> None:
        """Run a command in the stage as a build does: as root and with the network, pip with this machine's settings.

        Raises:
            StepError: it failed.
        """
        ours = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_"))}
        call = self.enter(ENTER + GO, "env", f"--chdir={self.workdir}", *command)
        variables = ours | self.environment | self.arguments
        done = subprocess.run(call, env=variables, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise StepError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


@contextmanager
def built(directory: Path, build_arguments: Mapping[str, str]) -> Iterator["Image"]:
    """The image that the Dockerfile makes; everything of it is removed in the end.

    Raises:
        StepError: a step failed.
    """
    try:
        layers: dict[str, Layer] = {}
        for stage in read_stages():
            layers[stage.name or "last"] = layer = _base(directory / str(len(layers)))
            for instruction in stage.instructions:
                _carry_out(instruction, layer, layers, build_arguments)
        yield Image(stage, layer)
    finally:
        shutil.rmtree(directory)


def _base(directory: Path) -> Layer:
    """This machine in place of a base image: its Python has to be named `python`, and be within reach of everybody."""
    for part in ("upper", "work", "merged"):
        (directory / part).mkdir(parents=True)
    python = Path(sys.base_prefix) / "bin" / "python"
    layer = Layer(directory, {"PATH": f"{python.parent}:{BASE_PATH}", "LANG": "C.UTF-8"})
    layer.run("sh", "-c", f"[ -e {python} ] || ln -s python{sys.version_info.major}.{sys.version_info.minor} {python}")
    layer.run("chmod", "o+x", *(str(parent) for parent in python.parents))
    layer.base = layer.added()
    return layer


def _carry_out(
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
            layer.at(".").mkdir(parents=True, exist_ok=True)
        case "RUN":
            layer.run("/bin/sh", "-c", instruction.value)
        case "COPY":
            _copy(instruction.words(variables), layer, layers)


def _copy(words: list[str], layer: Layer, layers: Mapping[str, Layer]) -> None:
    *sources, target = words
    if sources[0].startswith("--from="):
        source = layers[sources[0].removeprefix("--from=")]
        for path in sources[1:]:
            shutil.copytree(source.at(path), layer.at(target), symlinks=True, dirs_exist_ok=True, copy_function=os.link)
        return
    for name in sources:
        files = context(name)
        if not files:
            raise StepError(f"COPY {name}: .dockerignore lets nothing of that name through")
        for file in files:
            # A directory's content is copied, a file keeps its name.
            relative = file.relative_to(name) if file != Path(name) else Path(file.name)
            destination = layer.at(target) / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, destination)


@dataclass(frozen=True)
class Image:
    """The last stage, ready to run."""

    stage: Stage
    layer: Layer

    def entry(self, volume: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> list[str]:
        """The command line of a container: the entry point with arguments, as `docker run` starts it."""
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
    """A container that runs: the process that made its namespaces, and its process number 1 as seen from outside."""

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
        """A line of the first process's status."""
        lines = Path(f"/proc/{self.first}/status").read_text(encoding="utf-8").splitlines()
        (value,) = (line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))
        return value


@contextmanager
def running(image: Image, volume: Path, *, variables: Mapping[str, str]) -> Iterator[Container]:
    """A container that has said that it serves."""
    call = image.entry(volume, variables=variables)
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as outer:
        try:
            assert outer.stdout is not None
            line = outer.stdout.readline()
            assert line.startswith("SERVING on "), line
            yield Container(image, outer, *_children(outer.pid))
        finally:
            # The kernel ends a container with its process number 1.
            for child in _children(outer.pid):
                os.kill(child, signal.SIGKILL)


def _children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in listed.read_text(encoding="utf-8").split()] if listed.exists() else []
