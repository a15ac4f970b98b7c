"""Remove from an environment what the server never loads: `python prune.py SITE_PACKAGES`, called by the Dockerfile.

Every distribution stays, with its metadata and its license files, so that the lock file describes the image. The rules
are for the versions in the lock file: tests/integration/container runs the server and its commands with what remains.

The Dockerfile copies this file alone, so it needs nothing but Python and `strip`.
"""

import argparse
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Rule:
    """Paths that the server never loads: glob patterns below site-packages, and names that stay."""

    reason: str
    patterns: tuple[str, ...]
    kept: frozenset[str] = frozenset()

    def paths(self, packages: Path) -> Iterator[Path]:
        """Yield the paths to remove, none of them in a distribution's metadata, which has the licenses."""
        for pattern in self.patterns:
            for path in packages.glob(pattern):
                if path.name not in self.kept and not path.relative_to(packages).parts[0].endswith(".dist-info"):
                    yield path


RULES = (
    Rule(
        "test programs of libtorch", ("torch/test", "torch/bin/test_*", "torch/bin/*Test", "torch/bin/upgrader_models")
    ),
    Rule("compiler of torch's own build", ("torch/bin/protoc*",)),
    Rule("headers and CMake files for extensions in C++", ("torch/include", "torch/share/cmake")),
    Rule("tests of the packages", ("*/**/tests",)),
    Rule(
        "models other than Llama; `auto` has the names that transformers looks up",
        ("transformers/models/*/",),
        kept=frozenset({"auto", "llama", "__pycache__"}),
    ),
)
# Names of local functions, for debuggers. The loader uses the dynamic symbols, which `strip` keeps.
STRIPPED = ("torch/lib/libtorch_cpu.so", "torch/lib/libtorch_python.so")


def main() -> None:
    """Prune the environment of the command line, and print what each rule has freed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("packages", type=Path, help="site-packages folder of the environment")
    for reason, freed in prune(parser.parse_args().packages).items():
        print(f"{freed / 1e6:7.1f} MB  {reason}")


def prune(packages: Path) -> dict[str, int]:
    """Remove what the rules name and strip the large libraries; return the freed bytes by reason."""
    freed = {rule.reason: sum(map(_remove, list(rule.paths(packages)))) for rule in RULES}
    freed["symbol tables of torch's libraries"] = _strip([packages / name for name in STRIPPED])
    return freed


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; a link has the length of its target's name."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(map(size, path.iterdir()))


def _remove(path: Path) -> int:
    if not path.exists():  # an earlier pattern has removed it
        return 0
    freed = size(path)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    return freed


def _strip(libraries: list[Path]) -> int:
    found = [path for path in libraries if path.exists()]
    before = sum(map(size, found))
    if found:
        subprocess.run(["strip", "--strip-unneeded", *found], check=True)
    return before - sum(map(size, found))


if __name__ == "__main__":
    main()
