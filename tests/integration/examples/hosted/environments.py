"""Environments of clients: a virtual environment or `node_modules` with the packages of one client and nothing else."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
UV = Path(sys.executable).with_name("uv")
INSTALL_SECONDS = 300
RUN_SECONDS = 200


@dataclass(frozen=True)
class Program:
    """An installed client program."""

    command: tuple[str, ...]

    async def results(self, *arguments: str) -> Any:
        """Run the program and return what it prints, which is JSON."""
        process = await asyncio.create_subprocess_exec(
            *self.command,
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        )
        try:
            async with asyncio.timeout(RUN_SECONDS):
                output, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        assert process.returncode == 0, errors.decode()
        return json.loads(output.splitlines()[-1])


def install(program: str, folder: Path) -> Program:
    """Install the packages of a program, `NAME.py` or `NAME.mjs`, into a folder, in their locked versions."""
    name, _, suffix = program.partition(".")
    source = HERE / "programs" / program
    if suffix == "py":
        environment = folder / "environment"
        _run(program, [str(UV), "venv", "--quiet", "--python", sys.executable, str(environment)], folder)
        python = str(environment / "bin/python")
        packages = HERE / f"packages/{name}.txt"
        _run(program, [str(UV), "pip", "sync", "--quiet", "--python", python, str(packages)], folder)
        return Program((python, str(source)))
    if missing := [tool for tool in ("node", "npm") if shutil.which(tool) is None]:
        _not_tested(program, f"{' and '.join(missing)} not found")
    shutil.copytree(HERE / "packages" / name, folder, dirs_exist_ok=True)
    _run(program, ["npm", "ci", "--silent", "--no-audit", "--no-fund", "--ignore-scripts"], folder)
    return Program(("node", str(shutil.copy(source, folder / program))))


def _run(program: str, command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    if done.returncode != 0:
        _not_tested(program, f"its packages cannot be installed: {done.stderr.strip()[-500:]}")


def _not_tested(program: str, reason: str) -> None:
    """Skip the test; fail it if REQUIRE_TOOLCHAINS is set, as in CI."""
    text = f"NOT TESTED WITH {program}: {reason}"
    if os.environ.get("REQUIRE_TOOLCHAINS"):
        pytest.fail(text)
    pytest.skip(text)
