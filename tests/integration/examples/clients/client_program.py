"""A client program of `examples/clients`, built and run with the commands of its README."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, TextIO

import pytest
from tests.support.processes import environment
from tests.support.repository import ROOT

CLIENTS = ROOT / "examples/clients"
# The commands and files of each language's toolchain.
TOOLCHAINS = {
    "browser": ["node", "npm", "protoc", "chromium"],
    "java": ["javac", "protoc", "grpc_java_plugin", "/usr/share/java/grpc-netty.jar"],
    "node": ["node", "npm"],
    "cpp": ["g++", "pkg-config", "protoc", "grpc_cpp_plugin", "/usr/include/grpcpp"],
    "go": ["go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc", "/usr/share/gocode/src/google.golang.org/grpc"],
    "ruby": ["ruby", "grpc_tools_ruby_protoc"],
}

RESUMING = ("browser", "node", "ruby")
"""The programs that send an idempotency key, and continue a stream that broke off; the page says so."""


def command_blocks(readme: Path) -> list[list[str]]:
    """Return the lines of each `sh` block of a README."""
    return [block.splitlines() for block in re.findall(r"(?ms)^```sh\n(.*?)^```", readme.read_text())]


def lines_of_code(program: Path) -> list[str]:
    """Return the lines that are not blank, a comment or an import; gofmt writes each import on its own line."""
    code = re.sub(r"(?ms)^import \(.*?^\)\n", "", program.read_text())
    return [line for line in code.splitlines() if line.strip() and not re.match(r" *(//|#|import )", line.strip())]


class Running(Protocol):
    """A program that reads lines and prints replies and errors."""

    def send(self, *lines: str) -> None:
        """Type lines."""

    async def wait_for_output(self, text: str) -> None:
        """Wait until the program has printed a text to its output, and skip it."""

    def interrupt(self) -> None:
        """Stop the reply in progress."""

    async def finish(self) -> tuple[str, str]:
        """Wait for all replies, and return the rest of the output and all errors."""


@dataclass(frozen=True)
class RunningProgram:
    """A running program and what it printed."""

    process: asyncio.subprocess.Process
    # A pipe, as in a shell: asyncio's own is a socket, whose end Node does not notice.
    standard_input: TextIO

    def send(self, *lines: str) -> None:
        """Type lines."""
        self.standard_input.write("".join(f"{line}\n" for line in lines))
        self.standard_input.flush()

    async def wait_for_output(self, text: str) -> None:
        """Wait until the program has printed a text to standard output."""
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            await self.process.stdout.readuntil(text.encode())

    def interrupt(self) -> None:
        """Send SIGINT to the shell and the program, as a terminal does for Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    async def finish(self) -> tuple[str, str]:
        """End the input, wait for the program's end, and return the rest of its output and of its errors."""
        self.standard_input.close()
        async with asyncio.timeout(60):
            output, errors = await self.process.communicate()
        assert self.process.returncode == 0, errors.decode()
        return output.decode(), errors.decode()


@dataclass(frozen=True)
class ClientProgram:
    """A program that was built in a copy of this checkout."""

    language: str
    checkout: Path
    attempts: ClassVar[str | None] = "1"
    """The header `grpc-previous-rpc-attempts` of a call that gRPC has repeated once."""

    @property
    def resumes(self) -> bool:
        """Whether the program continues a stream that broke off."""
        return self.language in RESUMING

    @property
    def commands(self) -> list[str]:
        """The README's commands after the installation of packages: `cd`, the build, and last the start."""
        return command_blocks(CLIENTS / self.language / "README.md")[1]

    def build(self) -> None:
        """Run the README's commands up to the program's start."""
        script = "\n".join(["set -e", *self.commands[:-1]])
        done = subprocess.run(
            ["bash", "-c", script], cwd=self.checkout, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    @asynccontextmanager
    async def running(self, address: str, *arguments: str, **variables: str) -> AsyncIterator[Running]:
        """Run the README's last command against a server."""
        directories = [line for line in self.commands if line.startswith("cd ")]
        script = "\n".join([*directories, " ".join([self.commands[-1], *arguments])])
        read_end, write_end = os.pipe()
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", script),
            cwd=self.checkout,
            env=environment(LLAMA2_ADDRESS=address, **variables),
            stdin=read_end,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        os.close(read_end)
        try:
            with os.fdopen(write_end, "w") as standard_input:
                yield RunningProgram(process, standard_input)
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):  # it has just ended
                    os.killpg(process.pid, signal.SIGKILL)
            await process.communicate()

    async def chat(
        self, address: str, *lines: str, arguments: tuple[str, ...] = (), **variables: str
    ) -> tuple[str, str]:
        """Run the program with these lines as its input, and return its output and its errors."""
        async with self.running(address, *arguments, **variables) as program:
            program.send(*lines)
            return await program.finish()


def require_toolchain(language: str, commands: Sequence[str] | None = None) -> None:
    """Skip the test if the language's toolchain is not installed; fail it if REQUIRE_TOOLCHAINS is set."""
    needed = TOOLCHAINS[language] if commands is None else commands
    missing = [name for name in needed if not (shutil.which(name) or Path(name).exists())]
    if missing:
        reason = f"NOT TESTED WITH THE CLIENT IN {language.upper()}: {', '.join(missing)} not found"
        if os.environ.get("REQUIRE_TOOLCHAINS"):
            pytest.fail(reason)
        pytest.skip(reason)
