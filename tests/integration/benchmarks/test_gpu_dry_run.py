"""`make bench-gpu` on a machine as its README says: a bare Python with torch and transformers, and no network."""

import json
import os
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
from benchmarks.gpu.packages import INSTALLED_THERE, dependencies
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.report import KERNEL_TABLES
from tests.support.repository import ROOT

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
MAX_CARRIED_BYTES = 20_000_000  # compressed


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of `make gpu-packages`."""
    folder = tmp_path_factory.mktemp("carried")
    command = [sys.executable, "-m", "benchmarks.gpu.packages", "--python", PYTHON, "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def installed_there(folder: Path) -> Path:
    """Link what the other machine has, torch and transformers with their dependencies, into a folder."""
    folder.mkdir()
    for name in set[str]().union(*(dependencies(name, PYTHON) for name in INSTALLED_THERE)):
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # triton, which the CPU build of torch does not need
            continue
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in {"..", "__pycache__"}}:
            if not (folder / top).exists():
                (folder / top).symlink_to(str(distribution.locate_file(top)))
    return folder


@pytest.mark.timeout(600)  # two starts of the server, and each part in a separate process
def test_the_whole_program_runs_from_a_bare_interpreter(carried: Path, tmp_path: Path) -> None:
    """Every part that does not need a GPU succeeds, and the results are complete."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    bare = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "LANG"}}
    command = ["make", "bench-gpu", f"PYTHON={tmp_path / 'bare/bin/python'}"]
    command += [f"GPU_PACKAGES={carried}:{installed_there(tmp_path / 'there')}"]
    command += [f"ARGS=--shape tiny --device cpu --rows 2 --limit-factor 10 --out {tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*-gpu-tiny.json")
    results = json.loads(file.read_text())
    assert results["failures"] == {}
    assert set(results["seconds"]) == set(PARTS)
    assert {name for name in results if name.startswith("kernels, ")} == set(KERNEL_TABLES)
    assert results["tests"]["skipped"] > 0
    assert results["tests"]["complete"]
    # The others need a GPU or 12-bit weights.
    unmeasured = [line.split(" | ")[0] for line in done.stdout.splitlines() if "| not measured |" in line]
    assert unmeasured == [
        "| 12-bit weights / roofline",
        "| engine only / transformers.generate, static cache and compile",
    ]


@pytest.mark.timeout(600)  # on a busy machine
def test_the_carried_packages_are_small(carried: Path, tmp_path: Path) -> None:
    """Compressed by xz, they fit into what a machine without a network can be sent."""
    archive = tmp_path / "packages.tar.xz"
    with tarfile.open(archive, "w:xz", preset=1) as file:  # the fastest
        # The test above compiles the modules.
        file.add(carried, filter=lambda entry: None if "__pycache__" in entry.name else entry)
    assert archive.stat().st_size < MAX_CARRIED_BYTES
