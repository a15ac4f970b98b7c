"""The adapters of `adapters.toml`: their toolchains, builds and commands."""

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "conformance/adapters/adapters.toml"


class BuildError(Exception):
    """An adapter could not be built; the message has the output of its build."""


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One adapter of the file."""

    name: str
    needs: tuple[str, ...]
    build_commands: tuple[str, ...]
    command: tuple[str, ...]
    known_failures: Mapping[str, str]

    @property
    def missing(self) -> list[str]:
        """The commands of the toolchain that are not installed."""
        return [name for name in self.needs if not (shutil.which(name) or Path(name).exists())]

    def build(self, folder: Path) -> list[str]:
        """Build the adapter in a folder, and return its command.

        Raises:
            BuildError: a command of the build failed.
        """
        for command in self.build_commands:
            line = self._fill(command, folder)
            done = subprocess.run(["bash", "-ec", line], cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise BuildError(f"{self.name}: {line}\n{done.stdout}{done.stderr}")
        return [self._fill(part, folder) for part in self.command]

    @staticmethod
    def _fill(text: str, folder: Path) -> str:
        return text.replace("{python}", sys.executable).replace("{build}", str(folder)).replace("{root}", str(ROOT))


def read_adapters(path: Path = FILE) -> list[AdapterEntry]:
    """Return the adapters of a file."""
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    return [
        AdapterEntry(
            name,
            needs=tuple(entry["needs"]),
            build_commands=tuple(entry.get("build", ())),
            command=tuple(entry["command"]),
            known_failures=entry.get("known_failures", {}),
        )
        for name, entry in document.items()
    ]
