"""Wrong uses of `llama2`: each prints one line that names the subject and the remedy."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from tests.integration.client.cli.command import run
from tests.support.certificates import Authority
from tests.support.scripted_server import ScriptedServer

FIELD = error_details_pb2.BadRequest.FieldViolation


class WrongUse(NamedTuple):
    """A command line, the exit code and the only line of standard error; `{name}` stands for a name of `places`."""

    arguments: str
    code: int
    line: str
    variables: dict[str, str] = {}  # noqa: RUF012 - never changed


COMMAND_LINES = [
    WrongUse("tokenz Hi", 2, "tokenz: no such command; did you mean tokens?"),
    WrongUse(
        "hello",
        2,
        "hello: no such command; choose generate, chat, card, tokens, usage, health, completion, verify",
    ),
    WrongUse("generate", 2, "TEXT: missing, and standard input is empty; give TEXT or --messages"),
    WrongUse("generate two words", 2, 'TEXT: must be one argument; put quotes around it, as in "Tell me a story"'),
    WrongUse("card now", 2, "now: unexpected argument; see llama2 card --help"),
    WrongUse("generate Hi --max-token 5", 2, "--max-token: no such option; did you mean --max-tokens?"),
    WrongUse("generate Hi --zzz", 2, "--zzz: no such option; see llama2 generate --help"),
    WrongUse(
        "generate Hi --address {dead}",
        2,
        "--address: no such option; it comes before the command, as in `llama2 --address … generate`",
    ),
    WrongUse(
        "--max-tokens 5 generate Hi",
        2,
        "--max-tokens: no such option; it comes after the command, as in `llama2 generate --max-tokens …`",
    ),
    WrongUse("generate Hi --max-tokens", 2, "--max-tokens: requires a value; see llama2 generate --help"),
    WrongUse("--tls=yes card", 2, "--tls: does not take a value; see llama2 --help"),
    WrongUse("generate Hi --top-p hot", 2, "--top-p: must be a number, got hot"),
    WrongUse("generate Hi --max-tokens 1.5", 2, "--max-tokens: must be a whole number, got 1.5"),
    WrongUse("--timeout 0 card", 2, "--timeout: must be a number above 0"),
    WrongUse("--timeout soon card", 2, "--timeout: must be a number, got soon"),
    WrongUse("card", 2, "LLAMA2_TIMEOUT: must be a number above 0", {"LLAMA2_TIMEOUT": "-1"}),
    WrongUse("--quota-wait -1 card", 2, "--quota-wait: must be a number of at least 0"),
    WrongUse("usage --since yesterday", 2, "--since: must be a day of the form YYYY-MM-DD, got yesterday"),
    WrongUse("completion tcsh", 2, "SHELL: must be bash or zsh or fish, got tcsh"),
    WrongUse("completion", 2, "SHELL: missing; see llama2 completion --help"),
    WrongUse("generate Hi --messages {null}", 2, "TEXT and --messages: exclude each other; give one of them"),
    WrongUse(
        "generate --messages {missing}",
        2,
        "--messages: '{missing}': No such file or directory; pass a file that you can read",
    ),
    WrongUse(
        "generate --messages {null}",
        2,
        "--messages: {null} is not valid JSON (Expecting value: line 1 column 1 (char 0)); pass a list of messages",
    ),
    WrongUse(
        "chat --messages {question}",
        2,
        "--messages: {question} is not a conversation of `/save` (messages: the last one is a question without an "
        "answer; remove it and ask it again)",
    ),
    WrongUse("--ca {missing} card", 2, "--ca: file '{missing}' does not exist; pass a file that you can read"),
    WrongUse("--key {null} card", 2, "--certificate and --key: one of them is missing; give both"),
    WrongUse("--server-name a.example.com card", 2, "--server-name: needs TLS; add --tls or --ca FILE"),
    WrongUse("--address http://localhost:1 card", 2, "--address: must be HOST:PORT, not a URL; remove http://"),
    WrongUse("--address localhost:port card", 2, "--address: the port must be a number from 1 to 65535, got port"),
    WrongUse("--address :50051 card", 2, "--address: the host is missing; pass HOST:PORT, such as localhost:50051"),
    WrongUse(
        "card",
        2,
        "LLAMA2_API_KEY: must be printable ASCII, and not empty; copy the key again",
        {"LLAMA2_API_KEY": "s3crét"},
    ),
    WrongUse("--api-key= card", 2, "--api-key: must be printable ASCII, and not empty; copy the key again"),
]

CALLS = [
    WrongUse(
        "--address {dead} card",
        3,
        "{dead}: the connection is refused, because nothing listens at this address; "
        "start a server with `make run` or `llama2-server`, or correct --address",
    ),
    WrongUse(
        "--address {dead} --timeout 0.5 card",
        3,
        "{dead}: the connection is refused, because nothing listens at this address; "
        "start a server with `make run` or `llama2-server`, or correct --address",
    ),
    WrongUse(
        "--address {silent} --timeout 0.5 card",
        3,
        "{silent}: nothing answers at this address; correct --address, or check the network and its firewalls",
    ),
    WrongUse(
        "--address missing.invalid card",
        3,
        "missing.invalid: the name cannot be resolved; correct --address",
    ),
    WrongUse(
        "--address llama2.example.com card",
        3,
        "llama2.example.com: the proxy does not connect to the server; "
        "unset the variable https_proxy, or add the server's host to no_proxy",
        {"https_proxy": "http://{dead}"},
    ),
    WrongUse(
        "--address {tls} card",
        3,
        "{tls}: the server closes connections without TLS, as a server with TLS does; "
        "add --tls, or --ca FILE with the certificate of the server's authority",
    ),
    WrongUse(
        "--address {plain} --tls card",
        3,
        "{plain}: the server does not use TLS; "
        "leave out --tls, --ca and --certificate, or start the server with a certificate",
    ),
    WrongUse(
        "--address {tls} --tls card",
        3,
        "{tls}: the server's certificate is not signed by a trusted authority; "
        "pass the certificate of the server's authority with --ca FILE",
    ),
    WrongUse(
        "--address {named} --ca {ca} card",
        3,
        "{named}: the server's certificate is for another host name; "
        "use a name of the certificate in --address, or pass it with --server-name",
    ),
    WrongUse(
        "--address {mutual} --ca {ca} card",
        3,
        "{mutual}: the server closes connections without a client certificate that it trusts; "
        "pass a client certificate with --certificate FILE and --key FILE",
    ),
]


@contextlib.contextmanager
def unanswered_addresses() -> Iterator[dict[str, str]]:
    """Bind two ports: one refuses connections, the other never answers."""
    with socket.socket() as dead, socket.socket() as silent:
        for unused in (dead, silent):
            unused.bind(("127.0.0.1", 0))
        silent.listen()
        ports = {"dead": dead, "silent": silent}
        yield {name: f"127.0.0.1:{unused.getsockname()[1]}" for name, unused in ports.items()}


@pytest.fixture
async def places(server: ScriptedServer, tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    """The addresses and the files of the command lines."""
    authority = Authority(tmp_path)

    def credentials(name: str, *, mutual: bool = False) -> grpc.ServerCredentials:
        certificate, key = authority.pair(name)
        pairs = [(key.read_bytes(), certificate.read_bytes())]
        return grpc.ssl_server_credentials(pairs, authority.root if mutual else None, mutual)

    async with (
        ScriptedServer.running(credentials=credentials("127.0.0.1")) as tls,
        ScriptedServer.running(credentials=credentials("llama2.example.com")) as named,
        ScriptedServer.running(credentials=credentials("127.0.0.1", mutual=True)) as mutual,
    ):
        files = {"missing": str(tmp_path / "missing"), "null": "/dev/null", "ca": str(authority.root_file())}
        servers = {"plain": server, "tls": tls, "named": named, "mutual": mutual}
        with unanswered_addresses() as unanswered:
            yield {**files, **unanswered, **{name: server.address for name, server in servers.items()}}


async def check(use: WrongUse, places: dict[str, str]) -> None:
    """Run the command line; the only output must be its line."""
    no_proxy = dict.fromkeys(("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"), "")
    if "https_proxy" in use.variables:
        del no_proxy["grpc_proxy"]  # an empty variable would disable the proxy
    variables = {name: value.format(**places) for name, value in use.variables.items()}
    arguments = [argument.format(**places) for argument in use.arguments.split()]
    result = await run("", *arguments, stdin=b"", **(no_proxy | variables))
    assert (result.code, result.out, result.err) == (use.code, "", f"llama2: {use.line.format(**places)}\n")


@pytest.mark.parametrize("use", COMMAND_LINES, ids=lambda use: use.arguments)
async def test_a_wrong_command_line_is_one_line_with_the_remedy(use: WrongUse, tmp_path: Path) -> None:
    """The only output is one line: the subject, the problem and the remedy."""
    question = tmp_path / "question.json"
    question.write_text('[{"role": "user", "content": "Hi"}]')
    files = {"missing": str(tmp_path / "missing"), "question": str(question), "null": "/dev/null"}
    await check(use, {"dead": "localhost:1", **files})


async def test_a_call_without_an_answer_is_one_line_with_the_remedy(places: dict[str, str]) -> None:
    """Each mistake in the address, in TLS and in the proxy has its own line."""
    await asyncio.gather(*(check(use, places) for use in CALLS))
    assert len({use.line.partition(": ")[2] for use in CALLS}) == len(CALLS) - 1  # one mistake has two deadlines


def test_there_are_thirty_wrong_command_lines() -> None:
    """The table has at least 30 command lines that no server sees."""
    assert len({use.arguments + str(use.variables) for use in COMMAND_LINES}) >= 30


@pytest.mark.parametrize(
    ("field", "arguments", "subject"),
    [
        ("top_p", ["Hi", "--top-p", "1.5"], "--top-p"),
        ("max_tokens", ["Hi", "--max-tokens", "0"], "--max-tokens"),
        ("prompt", ["Hi"], "TEXT"),
        ("stop[1]", ["Hi", "--stop", ""], "--stop"),
        ("since", ["Hi"], "since"),
    ],
)
async def test_a_violation_names_the_flag(
    server: ScriptedServer, field: str, arguments: list[str], subject: str
) -> None:
    """A rule of the server is printed with the flag or argument that set the field."""
    bad_request = error_details_pb2.BadRequest(field_violations=[FIELD(field=field, description="must be smaller")])
    server.script_error(grpc.StatusCode.INVALID_ARGUMENT, "1 violation", bad_request)
    result = await run(server.address, "generate", *arguments)
    assert (result.code, result.out, result.err) == (2, "", f"llama2: {subject}: must be smaller\n")


async def test_a_violation_of_a_message_names_the_file(server: ScriptedServer, tmp_path: Path) -> None:
    """A rule for a message is printed with --messages and the path of the field."""
    violation = FIELD(field="messages[0].role", description="must be user")
    server.script_error(
        grpc.StatusCode.INVALID_ARGUMENT, "1", error_details_pb2.BadRequest(field_violations=[violation])
    )
    file = tmp_path / "messages.json"
    file.write_text('[{"role": "human", "content": "Hi"}]')
    result = await run(server.address, "generate", "--messages", str(file))
    assert result.err == "llama2: --messages: messages[0].role: must be user\n"


async def test_quota_wait_waits(server: ScriptedServer) -> None:
    """--quota-wait sends the call again when the quota allows it."""
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(nanos=1_000_000))
    server.script_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "quota", error_details_pb2.QuotaFailure(), retry)
    server.script_reply("Hi")
    assert (await run(server.address, "--quota-wait", "5", "generate", "Hi")).out == "Hi\n"


@pytest.mark.parametrize("options", [[], ["--no-stream"]])
async def test_a_broken_reply_continues(server: ScriptedServer, options: list[str]) -> None:
    """Each part of a reply is printed once although its connection breaks; with --no-resume, it is an error."""
    server.script_error(grpc.StatusCode.UNAVAILABLE, after=("Hello",))
    server.script_reply(" world")
    server.script_error(grpc.StatusCode.UNAVAILABLE, after=("Hello",))
    assert (await run(server.address, "generate", "Hi", *options)).out == "Hello world\n"
    assert (await run(server.address, "--no-resume", "generate", "Hi", *options)).code == 3
    assert (len(set(server.keys)), server.keys[-1]) == (2, "")


async def test_server_name_is_checked_instead_of_the_host(places: dict[str, str]) -> None:
    """--server-name accepts a certificate for this name."""
    tls = ["--address", places["named"], "--ca", places["ca"], "--server-name", "llama2.example.com"]
    assert (await run(places["plain"], *tls, "health")).out == "SERVING\n"
