"""A reader for the Dockerfile (its stages, each with its instructions in order) and for .dockerignore."""

import fnmatch
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

ROOT = Path(__file__).parents[3]
BUILDING = {"ARG", "COPY", "ENV", "FROM", "RUN", "USER", "WORKDIR"}
DESCRIBING = {"ENTRYPOINT", "EXPOSE", "HEALTHCHECK", "LABEL", "STOPSIGNAL", "VOLUME"}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; `value` is the text after the name, with continued lines joined."""

    name: str
    value: str

    def words(self, variables: Mapping[str, str] | None = None) -> list[str]:
        """Return the value as words with variables replaced, or the unchanged items of a JSON list."""
        if self.value.startswith("["):
            return [str(item) for item in json.loads(self.value)]
        return shlex.split(Template(self.value).safe_substitute(variables or {}))

    def pairs(self, variables: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the value as NAME=VALUE words; a word without `=` gets an empty value."""
        return {name: value for name, _, value in (word.partition("=") for word in self.words(variables))}

    def command(self) -> list[str]:
        """Return the command of a HEALTHCHECK."""
        return [str(item) for item in json.loads(self.value.partition("CMD ")[2])]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: its base image, its optional name and its instructions."""

    base: str
    name: str | None
    instructions: tuple[Instruction, ...]

    def all(self, name: str) -> list[Instruction]:
        """Return all instructions with this name."""
        return [instruction for instruction in self.instructions if instruction.name == name]

    def one(self, name: str) -> Instruction:
        """Return the only instruction with this name.

        Raises:
            ValueError: the stage has no such instruction, or more than one.
        """
        (instruction,) = self.all(name)
        return instruction


def read_stages(path: Path = ROOT / "Dockerfile") -> list[Stage]:
    """Read the stages of a Dockerfile.

    Raises:
        ValueError: the Dockerfile has an instruction that this reader does not know.
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
    """Return the files under a name that belong to the build context: .dockerignore does not exclude them."""
    lines = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    found = [root / name, *(root / name).rglob("*")]
    return sorted(
        path for path in (file.relative_to(root) for file in found if file.is_file()) if _included(path, rules)
    )


def _included(path: Path, rules: list[str]) -> bool:
    """Return whether the last rule that matches a file or one of its parent directories includes it."""
    included, parts = True, path.parts
    for rule in rules:
        if _matches(rule.removeprefix("!"), parts):
            included = rule.startswith("!")
    return included


def _matches(pattern: str, parts: tuple[str, ...]) -> bool:
    """Return whether a pattern matches a file with these parts, or one of its parent directories."""
    if pattern.startswith("**/"):
        return any(fnmatch.fnmatchcase(part, pattern.removeprefix("**/")) for part in parts)
    wanted = pattern.split("/")
    return len(wanted) <= len(parts) and all(map(fnmatch.fnmatchcase, parts, wanted))
