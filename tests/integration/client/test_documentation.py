"""The page docs/python-client.md: its code blocks run, and its tables are complete."""

from __future__ import annotations

import ast
import asyncio
import base64
import inspect
import re
import sys
import tomllib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import NamedTuple

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from tests.integration.client.cli.command import environment
from tests.integration.client.cli.test_completion import BASH
from tests.support.certificates import Authority
from tests.support.receipts.vectors import KEYS, STATEMENT
from tests.support.repository import ROOT
from tests.support.scripted_server import ScriptedServer

import llama2_client
from llama2.v1 import text_generation_pb2
from llama2_client import Client, GenerationOptions, Llama2Error
from llama2_client.cli.chat.commands import HELP
from llama2_client.cli.main import cli
from llama2_server.errors import ServiceError
from llama2_server.receipts.receipt import sign

PAGE = ROOT / "docs" / "python-client.md"
ADDRESS = "localhost:50051"


class Block(NamedTuple):
    """A code block of the page."""

    section: str
    language: str
    code: str


def blocks() -> Iterator[Block]:
    """Yield the code blocks of the page in order."""
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL):
            yield Block(section.splitlines()[0], language, code)


def rows(header: str) -> list[list[str]]:
    """Return the cells of the table whose first cell is this header."""
    _, _, table = PAGE.read_text().partition(f"\n| {header} |")
    lines = table.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def programs(*, complete: bool) -> list[Block]:
    """Return the Python blocks that are complete programs, or the other ones, which use a `client`."""
    marks = ("asyncio.run(", "SyncClient(")
    python = [block for block in blocks() if block.language == "python"]
    return [block for block in python if any(mark in block.code for mark in marks) is complete]


def names(selected: list[Block]) -> list[str]:
    """Return the sections of these blocks, as test ids."""
    return [block.section for block in selected]


SNIPPETS = programs(complete=False)
PROGRAMS = programs(complete=True)
COMMANDS = [block for block in blocks() if block.language == "sh" and block.section != "Install"]
COMPLETION = [block for block in blocks() if block.language == "bash"]  # test_completion.py runs it


@pytest.fixture
async def tls_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ScriptedServer]:
    """Run a server with TLS. The working directory has the certificate files that the page names."""
    authority = Authority(tmp_path)
    certificate, key = authority.pair()
    authority.root_file()
    (tmp_path / "client.pem").write_bytes(certificate.read_bytes())
    (tmp_path / "client-key.pem").write_bytes(key.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMA2_API_KEY", "s3cret")
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    async with ScriptedServer.running(credentials=credentials) as server:
        yield server


def script(server: ScriptedServer, section: str) -> None:
    """Script the errors that the examples of this section handle."""
    if section == "Errors":
        violation = error_details_pb2.BadRequest.FieldViolation(field="top_p", description="must be in (0, 1], got 1.5")
        bad_request = error_details_pb2.BadRequest(field_violations=[violation])
        server.script_error(grpc.StatusCode.INVALID_ARGUMENT, "1 violation", bad_request)
    if section == "Retries":
        retry = error_details_pb2.RetryInfo(retry_delay=Duration(nanos=1))
        server.script_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "quota", error_details_pb2.QuotaFailure(), retry)
        server.script_reply("Once upon a time.")
    if section == "Receipts":
        request = {"prompt": "Tell me a story about a fox."}
        receipt = sign(KEYS, replace(STATEMENT, request=request, text="A fox."))
        completion = text_generation_pb2.Completion(receipt=text_generation_pb2.Receipt(**receipt._asdict()))
        server.script_reply("A fox.", completion=completion)
        Path("receipts.key.pub").write_bytes(base64.b64encode(KEYS.public.raw))


@pytest.mark.parametrize("block", SNIPPETS, ids=names(SNIPPETS))
async def test_snippet_runs(
    block: Block,
    client: Client,
    server: ScriptedServer,
    tls_server: ScriptedServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A snippet runs without an error, with `client` connected to a server."""
    script(server, block.section)
    address = tls_server.address if block.section == "TLS and API keys" else server.address
    source = block.code.replace(ADDRESS, address)
    code = compile(source, str(PAGE), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    coroutine = FunctionType(code, {"client": client})()
    if inspect.iscoroutine(coroutine):
        await coroutine
        assert server.requests or tls_server.requests
    if block.section == "Errors":
        assert capsys.readouterr().out == "top_p must be in (0, 1], got 1.5\n"
    if block.section == "Retries":
        assert capsys.readouterr().out == "Once upon a time.\n"
    if block.section == "Receipts":
        assert capsys.readouterr().out == f"{STATEMENT.time.replace(microsecond=0)} 42 7.7112\n"


@pytest.mark.parametrize("block", PROGRAMS, ids=names(PROGRAMS))
async def test_program_runs(block: Block, server: ScriptedServer) -> None:
    """A complete program runs in a separate process and prints the reply."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", block.code.replace(ADDRESS, server.address)),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    output = {
        "Quick start": "Hello world\nEND_OF_SEQUENCE 13 12.1176\n",
        "The synchronous client": "Hello worldHello world\n",
    }
    assert (process.returncode, out.decode()) == (0, output[block.section])


@pytest.mark.parametrize("block", COMMANDS, ids=names(COMMANDS))
async def test_commands_run(block: Block, server: ScriptedServer, tmp_path: Path) -> None:
    """Each line of a shell block succeeds."""
    llama2 = tmp_path / "llama2"
    llama2.write_text(f'#!/bin/sh\nexec {sys.executable} -m llama2_client.cli "$@"\n')
    llama2.chmod(0o755)
    variables = environment(server.address)
    process = await asyncio.create_subprocess_exec(
        *("sh", "-e", "-c", block.code.replace(ADDRESS, server.address)),
        env=variables | {"PATH": f"{tmp_path}:{variables['PATH']}"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert "Hello world" in out.decode()


def test_install_commands_are_valid() -> None:
    """The repository is an installable project that has every extra on the page."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [block.code for block in blocks() if block.section == "Install"] == ["pip install .\n"]
    assert project["scripts"]["llama2"] == "llama2_client.cli.__main__:main"
    for extra in re.findall(r"pip install '\.\[(\w+)\]'", PAGE.read_text()):
        assert extra in project["optional-dependencies"]


def test_every_block_is_tested() -> None:
    """The page has no code block in a language that no test runs."""
    tested = len(SNIPPETS) + len(PROGRAMS) + len(COMMANDS) + len(COMPLETION) + 1
    assert len(list(blocks())) == tested == PAGE.read_text().count("```") // 2


def test_the_completion_line_is_the_tested_one() -> None:
    """The line for bash is the first command of the completion test."""
    (block,) = COMPLETION
    assert block.code in BASH


def test_the_commands_of_a_chat_are_those_of_its_help() -> None:
    """The table has the commands that /help prints, in order."""
    listed = re.findall(r"^(/\w+(?: [A-Z]+)?) +(.+)$", HELP, flags=re.MULTILINE)
    documented = {name.strip("`"): meaning for name, meaning in rows("command")}
    assert list(documented) == [name for name, _ in listed]


def test_the_options_are_complete() -> None:
    """The table of options has every generation option, in order."""
    assert [row[0].strip("`") for row in rows("option")] == list(GenerationOptions.__annotations__)


def test_the_reply_fields_are_complete() -> None:
    """The table of reply fields has every field of Reply."""
    documented = {name for row in rows("field") for name in re.findall(r"`(\w+)`", row[0])}
    assert documented == set(llama2_client.Reply.__dataclass_fields__)


def test_the_errors_are_complete() -> None:
    """The table of errors has every exception with its status, and every reason of the server exactly once."""
    table = rows("exception")
    exceptions = {
        name: value
        for name in llama2_client.__all__
        if isinstance(value := getattr(llama2_client, name), type) and issubclass(value, Llama2Error)
    }
    expected = {f"`{name}`": kind.default_code.name for name, kind in exceptions.items() if kind is not Llama2Error}
    assert {row[0]: row[1] for row in table} == expected | {"`Llama2Error`": "any other"}
    documented = sorted((reason, row[1]) for row in table for reason in re.findall(r"\w+", row[2]))
    assert documented == sorted(server_reasons(ServiceError))


def server_reasons(kind: type[ServiceError]) -> Iterator[tuple[str, str]]:
    """Yield the reason and the status of a server error and of all its subclasses."""
    if "reason" in vars(kind):
        yield kind.reason, kind.code.name
    for subclass in kind.__subclasses__():
        yield from server_reasons(subclass)


def test_the_exit_codes_are_those_of_the_help() -> None:
    """The table of exit codes equals the list in `llama2 --help`."""
    listed = re.findall(r"^ +(\d+) +(.+)$", cli.help or "", flags=re.MULTILINE)
    assert [tuple(row) for row in rows("exit code")] == listed
