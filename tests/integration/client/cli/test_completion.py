"""`llama2 completion`: the scripts complete commands and options in real shells."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

import pytest
from tests.integration.client.cli.command import environment

BASH = """
set -eu
eval "$(llama2 completion bash)"
complete_words() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    _llama2_completion llama2
    echo "${COMPREPLY[@]}"
}
complete_words llama2 gen
complete_words llama2 generate --max
complete_words llama2 completion z
complete -p llama2
"""
FISH = """
llama2 completion fish | source
complete --do-complete "llama2 gen"
complete --do-complete "llama2 generate --max"
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A search path with the `llama2` command first."""
    llama2 = tmp_path / "llama2"
    llama2.write_text(f'#!/bin/sh\nexec {sys.executable} -m llama2_client.cli "$@"\n')
    llama2.chmod(0o755)
    return f"{tmp_path}:{environment('')['PATH']}"


async def output_of(path: str, *command: str) -> list[str]:
    """Return the lines that a shell prints."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment("", PATH=path),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode().splitlines()


async def test_bash_completes_commands_and_options(path: str) -> None:
    """After the script of `llama2 completion bash`, bash completes commands, options and arguments."""
    lines = await output_of(path, "bash", "--norc", "-c", BASH)
    assert lines[:3] == ["generate", "--max-tokens", "zsh"]
    assert "-F _llama2_completion llama2" in lines[3]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
async def test_fish_completes_commands_and_options(path: str) -> None:
    """After the script of `llama2 completion fish`, fish completes commands and options."""
    lines = await output_of(path, "fish", "--no-config", "-c", FISH)
    assert [line.split("\t")[0] for line in lines] == ["generate", "--max-tokens"]


async def test_zsh_gets_a_compdef_script(path: str) -> None:
    """`llama2 completion zsh` prints a function for zsh's compdef, and zsh accepts it if it is installed."""
    lines = await output_of(path, "llama2", "completion", "zsh")
    assert lines[0] == "#compdef llama2"
    if shutil.which("zsh") is not None:
        await output_of(path, "zsh", "-f", "-c", "llama2 completion zsh | zsh -n")
