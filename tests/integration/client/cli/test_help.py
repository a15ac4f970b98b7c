"""`llama2 --help` and `llama2 --version`."""

from __future__ import annotations

import asyncio
import sys

from tests.integration.client.cli.command import run


async def test_help_documents_the_exit_codes_without_importing_grpc() -> None:
    """`llama2 --help` lists the exit codes and is fast, because it does not import gRPC."""
    script = "import sys; sys.argv[1:] = ['--help']; from llama2_client.cli.main import main\n"
    script += "try: main()\nexcept SystemExit as end: print(end.code, 'grpc' in sys.modules, 'asyncio' in sys.modules)"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    *lines, last = out.decode().splitlines()
    assert last == "0 False False"
    for code in (0, 1, 2, 3, 4, 5, 6, 130):
        assert any(line.split()[:1] == [str(code)] for line in lines)


async def test_version_prints_the_program_and_its_version() -> None:
    """`llama2 --version` prints the name of the program and its version."""
    result = await run("", "--version")
    assert (result.code, result.out.split()[0]) == (0, "llama2")


async def test_no_arguments_print_the_help() -> None:
    """`llama2` alone prints the help on standard error, and exits with 2."""
    result = await run("")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Usage: llama2 [OPTIONS] COMMAND")
