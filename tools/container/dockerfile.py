"""Reads a Dockerfile: its stages, and in each of them the instructions in their order. And its .dockerignore."""

import fnmatch
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

ROOT = Path(__file__).parent.parent.parent
BUILDING = {"ARG", "COPY", "ENV", "FROM", "RUN", "USER", "WORKDIR"}
DESCRIBING = {"ENTRYPOINT", "EXPOSE", "HEALTHCHECK", "LABEL", "STOPSIGNAL", "VOLUME"}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; its value is the text after its name, with continued lines joined."""

    name: str
    value: str

    def words(self, variables: Mapping[str, str] | None = None) -> list[str]:
        """The value as words, variables replaced; of a JSON list its items, as they are."""
        if self.value.startswith("["):
            return [str(item) for item in json.loads(self.value)]
        return shlex.split(Template(self.value).safe_substitute(variables or {}))

    def pairs(self, variables: Mapping[str, str] | None = None) -> dict[str, str]:
        """The value as NAME=VALUE words; a word without a value has the empty one."""
        return {name: value for name, _, value in (word.partition("=") for word in self.words(variables))}

    def command(self) -> list[str]:
        """What a HEALTHCHECK runs."""
        return [str(item) for item in json.loads(self.value.partition("CMD ")[2])]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: its base image, its name if it has one, and what it does."""

    base: str
    name: str | None
    instructions: tuple[Instruction, ...]

    def all(self, name: str) -> list[Instruction]:
        """The instructions of this name."""
        return [instruction for instruction in self.instructions if instruction.name == name]

    def one(self, name: str) -> Instruction:
        """The one instruction of this name.

        Raises:
            ValueError: there is none, or more than one.
        """
        (instruction,) = self.all(name)
        return instruction

    @property
    def python_version(self) -> str:
        """The Python of the base, by its tag."""
        found = re.match(r"python:(\d+\.\d+\.\d+)-", self.base)
        if found is None:
            raise ValueError(f"the base {self.base} is no python:X.Y.Z-… image")
        return found[1]


def read_stages(path: Path = ROOT / "Dockerfile") -> list[Stage]:
    """The stages of a Dockerfile.

    Raises:
        ValueError: it has an instruction that is not known here.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    stages: list[Stage] = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        name, _, value = line.partition(" ")
        if name not in BUILDING | DESCRIBING:
            raise ValueError(f"{path}: the instruction {name} is not known here")
        if name == "FROM":
            base, _, alias = value.partition(" AS ")
            stages.append(Stage(base, alias or None, ()))
        else:
            last = stages[-1]
            added = Instruction(name, value.strip())
            stages[-1] = Stage(last.base, last.name, (*last.instructions, added))
    return stages


def context(name: str, root: Path = ROOT) -> list[Path]:
    """The files under a name that the builder is given: those that .dockerignore lets through."""
    lines = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    found = [root / name, *(root / name).rglob("*")]
    return sorted(path for path in (file.relative_to(root) for file in found if file.is_file()) if _passes(path, rules))


def _passes(path: Path, rules: list[str]) -> bool:
    """Whether a file passes the rules, of which the last that names it or a directory above it decides."""
    passes = True
    for rule in rules:
        pattern = rule.removeprefix("!")
        if any(_names(pattern, above) for above in (path, *path.parents)):
            passes = rule.startswith("!")
    return passes


def _names(pattern: str, path: Path) -> bool:
    if pattern.startswith("**/"):
        return fnmatch.fnmatch(path.name, pattern.removeprefix("**/"))
    parts = pattern.split("/")
    return len(parts) == len(path.parts) and all(map(fnmatch.fnmatch, path.parts, parts))
