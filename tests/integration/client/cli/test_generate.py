"""The `llama2` command as its users run it: in its own process, against a scripted server on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import shlex
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from tests.support.certificates import Authority
from tests.support.scripted_server import COMPLETION, USAGE, ScriptedServer

from llama2.v1 import account_pb2, text_generation_pb2

COMMAND = (sys.executable, "-m", "llama2_client.cli")
LLAMA2_REASON = error_details_pb2.ErrorInfo(reason="SOME_REASON", domain="llama2.v1")
RETRY_IN_11_SECONDS = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=10, nanos=500_000_000))

COMPLETION_JSON = {
    "finish_reason": "END_OF_SEQUENCE",
    "input_tokens": 20,
    "output_tokens": 13,
    "reused_input_tokens": 16,
    "neurons": "12.1176",
    "seed": "18446744073709551615",
    "cached": False,
    "request_id": "6d1a4a7d1f3e4c0e9a3b5c7d9e1f2a3b",
    "queue_time_seconds": 0.25,
    "time_to_first_token_seconds": 0.5,
    "total_time_seconds": 2.0,
}


class Result(NamedTuple):
    """How a command ended."""

    code: int | None
    out: str
    err: str


def environment(address: str, **more: str) -> dict[str, str]:
    """The environment of a command that calls this server."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA2_")}
    return inherited | {"LLAMA2_ADDRESS": address} | more


async def run(address: str, *arguments: str | bytes, stdin: bytes = b"", **variables: str) -> Result:
    """Run `llama2` with these arguments to its end."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        env=environment(address, **variables),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate(stdin)
    return Result(process.returncode, out.decode(), err.decode())


class Terminal:
    """A command at a terminal of its own, which is where Ctrl-C comes from."""

    def __init__(self, master: int) -> None:
        self._master = master
        self._seen = ""
        self._news = asyncio.Event()
        asyncio.get_running_loop().add_reader(master, self._read)

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, address: str, *arguments: str) -> AsyncIterator[tuple[Terminal, asyncio.subprocess.Process]]:
        """Start `llama2` with these arguments at a new terminal."""
        # A session leader's first terminal becomes its controlling one when it opens it.
        start = (
            "import os; os.close(os.open(os.ttyname(0), os.O_RDWR)); from llama2_client.cli.main import main; main()"
        )
        master, slave = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", start, *arguments),
            env=environment(address, TERM="dumb"),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        terminal = cls(master)
        try:
            yield terminal, process
        finally:
            asyncio.get_running_loop().remove_reader(master)
            if process.returncode is None:
                process.kill()
                await process.wait()
            os.close(master)

    def type(self, text: str) -> None:
        """Type this at the keyboard."""
        os.write(self._master, text.encode())

    async def press(self, keys: str, text: str) -> None:
        """Press keys until this stands on the terminal.

        A signal that comes after readline has shown its prompt, and before it waits, is seen at the next key only.
        """
        for _ in range(15):
            self.type(keys)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.until(text), 1)
                return
        raise AssertionError(f"never saw {text!r}, but {self._seen!r}")

    async def until(self, text: str) -> str:
        """Wait until this stands on the terminal; return what came up to it and forget that."""
        while text not in self._seen:
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), 15)
            except TimeoutError:
                raise AssertionError(f"never saw {text!r}, but {self._seen!r}") from None
        before, _, self._seen = self._seen.partition(text)
        return before + text

    def _read(self) -> None:
        try:
            self._seen += os.read(self._master, 65536).decode(errors="replace")
        except OSError:  # the command has ended
            asyncio.get_running_loop().remove_reader(self._master)
        self._news.set()


class TestHelp:
    async def test_documents_the_exit_codes_without_importing_grpc(self) -> None:
        """`llama2 --help` lists the exit codes, and is quick because it loads no gRPC."""
        script = "import sys; sys.argv[1:] = ['--help']; from llama2_client.cli.main import main\n"
        script += (
            "try: main()\nexcept SystemExit as end: print(end.code, 'grpc' in sys.modules, 'asyncio' in sys.modules)"
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", script), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        *lines, last = out.decode().splitlines()
        assert last == "0 False False"
        for code in (0, 1, 2, 3, 4, 5, 6, 130):
            assert any(line.split()[:1] == [str(code)] for line in lines)

    async def test_tells_the_version(self) -> None:
        """`llama2 --version` names the program and its version."""
        result = await run("", "--version")
        assert (result.code, result.out.split()[0]) == (0, "llama2")


class TestGenerate:
    async def test_text_on_stdout_and_figures_on_stderr(self, server: ScriptedServer) -> None:
        """Standard output has the text and nothing else; one line of figures is on standard error."""
        assert await run(server.address, "generate", "Hi") == Result(
            0,
            "Hello world\n",
            "end of sequence · 20 in (16 reused), 13 out · 12.1176 neurons · queue 0.25 s · first token 0.50 s"
            " · 8.0 tokens/s\n",
        )
        assert server.requests == [text_generation_pb2.GenerateRequest(prompt="Hi")]

    async def test_sends_every_option(self, server: ScriptedServer) -> None:
        """Every field of a request can be set from the command line."""
        options = (
            "--raw --max-tokens 7 --temperature 0 --top-p 1 --top-k 0 --seed 18446744073709551615 --stop a --stop b"
        )
        options += " --repetition-penalty 1.5 --frequency-penalty -0.5 --presence-penalty 0 --no-cache --no-stream"
        result = await run(server.address, "--api-key", "s3cret", "generate", "Hi", *options.split())
        assert (result.code, result.out) == (0, "Hello world\n")
        assert server.metadata[0]["authorization"] == "Bearer s3cret"
        assert server.requests == [
            text_generation_pb2.GenerateRequest(
                prompt="Hi",
                raw=True,
                max_tokens=7,
                temperature=0,
                top_p=1,
                top_k=0,
                seed=2**64 - 1,
                repetition_penalty=1.5,
                frequency_penalty=-0.5,
                presence_penalty=0,
                stop=["a", "b"],
                no_cache=True,
            )
        ]

    async def test_reads_standard_input(self, server: ScriptedServer) -> None:
        """With "-" the prompt is standard input, less its final newline, as UTF-8 whatever the locale."""
        result = await run(server.address, "generate", "-", stdin="żółw\n🦊\n".encode(), PYTHONIOENCODING="ascii")
        assert result.code == 0
        assert server.requests == [text_generation_pb2.GenerateRequest(prompt="żółw\n🦊")]

    async def test_prints_utf8_whatever_the_locale(self, server: ScriptedServer) -> None:
        """Text that the locale cannot show comes out as UTF-8 all the same."""
        server.says("żół", "w 🦊")
        assert (await run(server.address, "generate", "Hi", PYTHONIOENCODING="ascii")).out == "żółw 🦊\n"

    async def test_replies_to_a_conversation_in_a_file(self, server: ScriptedServer, tmp_path: Path) -> None:
        """--messages sends the conversation of a JSON file; a file that is none is a usage error."""
        conversation = tmp_path / "conversation.json"
        conversation.write_text('[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]')
        assert (await run(server.address, "generate", "--messages", str(conversation))).code == 0
        conversation.write_text('["Hi"]')
        result = await run(server.address, "generate", "--messages", str(conversation))
        assert (result.code, "is not a list of" in result.err) == (2, True)
        assert server.requests == [
            text_generation_pb2.GenerateRequest(
                messages=[
                    text_generation_pb2.Message(role="system", content="Be brief."),
                    text_generation_pb2.Message(role="user", content="Hi"),
                ]
            )
        ]

    async def test_json_is_one_object_a_line(self, server: ScriptedServer) -> None:
        """With --json each part is an object on its own line, the last with the figures; --no-stream: one object."""
        streamed, whole = await asyncio.gather(
            run(server.address, "generate", "Hi", "--json"),
            run(server.address, "generate", "Hi", "--json", "--no-stream"),
        )
        assert [json.loads(line) for line in streamed.out.splitlines()] == [
            {"response": "Hello"},
            {"response": " world"},
            {"response": "", "completion": COMPLETION_JSON},
        ]
        assert json.loads(whole.out) == {"response": "Hello world", "completion": COMPLETION_JSON}
        assert (streamed.err, whole.err) == ("", "")

    async def test_ctrl_c_stops_the_reply(self, server: ScriptedServer) -> None:
        """Text comes before the reply has ended; an interrupt then cancels the call and exits with 130, quietly."""
        server.hangs(after=("Once\n",))
        process = await asyncio.create_subprocess_exec(
            *(*COMMAND, "generate", "Hi"),
            env=environment(server.address),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"Once\n"
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()
        assert (process.returncode, out, err.strip()) == (130, b"", b"")
        await asyncio.wait_for(server.cancelled.wait(), 5)

    async def test_a_closed_pipe_ends_it_quietly(self, server: ScriptedServer) -> None:
        """A reader that leaves, like `head`, leaves no traceback behind."""
        server.says("one\n", *["x" * 20_000] * 100)
        process = await asyncio.create_subprocess_shell(
            f"{shlex.join(COMMAND)} generate Hi | head -n 1",
            env=environment(server.address),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert await process.communicate() == (b"one\n", b"")

    @pytest.mark.parametrize("arguments", [[], ["Hi", "--messages", os.devnull], ["Hi", "--top-p", "hot"]])
    async def test_wrong_usage_exits_with_2(self, arguments: list[str]) -> None:
        """What the command line cannot mean is a usage error, without any call."""
        result = await run("", "generate", *arguments)
        assert (result.code, result.err.startswith("Usage: llama2 generate")) == (2, True)

    async def test_messages_nested_without_end_are_wrong_usage(self, tmp_path: Path) -> None:
        """JSON that is deeper than Python's stack is refused like any other that is no conversation."""
        path = tmp_path / "messages.json"
        path.write_text("[" * 100_000)
        result = await run("", "generate", "--messages", str(path))
        assert (result.code, "is not JSON" in result.err) == (2, True)

    async def test_text_that_is_not_unicode_is_refused(self, server: ScriptedServer) -> None:
        """Bytes that are not UTF-8 are an invalid prompt, not a traceback."""
        expected = "error: the request is not valid\n  prompt: must be Unicode text, without lone surrogates\n"
        argument, stdin = await asyncio.gather(
            run(server.address, "generate", b"\xff"),
            run(server.address, "generate", "-", stdin=b"\xff"),
        )
        assert argument == stdin == Result(2, "", expected)


class TestErrors:
    @pytest.mark.parametrize(
        ("code", "details", "exit_code", "words"),
        [
            (grpc.StatusCode.INVALID_ARGUMENT, [], 2, "the request is not valid: in plain words"),
            (
                grpc.StatusCode.UNAVAILABLE,
                [LLAMA2_REASON, RETRY_IN_11_SECONDS],
                3,
                "the server is not available: in plain words; retry in 11 s",
            ),
            (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                [error_details_pb2.QuotaFailure(), RETRY_IN_11_SECONDS],
                4,
                "in plain words; next one in 11 s",
            ),
            (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                [RETRY_IN_11_SECONDS],
                4,
                "the server is busy: in plain words; retry in 11 s",
            ),
            (grpc.StatusCode.UNAUTHENTICATED, [], 5, "not authenticated: in plain words"),
            (grpc.StatusCode.PERMISSION_DENIED, [], 5, "not permitted: in plain words"),
            (grpc.StatusCode.DEADLINE_EXCEEDED, [], 6, "no reply in time"),
            (grpc.StatusCode.INTERNAL, [error_details_pb2.RequestInfo(request_id="6d1a")], 1, "under request 6d1a."),
            (grpc.StatusCode.DATA_LOSS, [], 1, "DATA_LOSS: in plain words"),
        ],
    )
    async def test_each_status_has_its_exit_code(
        self, server: ScriptedServer, code: grpc.StatusCode, details: list[Message], exit_code: int, words: str
    ) -> None:
        """Each status is told in plain words with its exit code, and never shows a traceback or the key."""
        server.refuses(code, "in plain words", *details, pushback_ms=-1)
        result = await run(server.address, "generate", "Hi", LLAMA2_API_KEY="s3cret")
        assert (result.code, result.out) == (exit_code, "")
        assert words in result.err
        assert result.err.startswith("error: ")
        assert "Traceback" not in result.err
        assert "s3cret" not in result.err

    async def test_each_violation_has_its_line(self, server: ScriptedServer) -> None:
        """Every violation stands on its own line, after its field; --json has them as objects."""
        field_violation = error_details_pb2.BadRequest.FieldViolation
        server.refuses(
            grpc.StatusCode.INVALID_ARGUMENT,
            "2 violations",
            LLAMA2_REASON,
            error_details_pb2.BadRequest(
                field_violations=[
                    field_violation(field="top_p", description="must be in (0, 1], got 1.5"),
                    field_violation(description="neither prompt nor messages"),
                ]
            ),
        )
        plain, as_json = await asyncio.gather(
            run(server.address, "tokens", "Hi"), run(server.address, "tokens", "Hi", "--json")
        )
        assert plain == Result(
            2,
            "",
            "error: the request is not valid\n  top_p: must be in (0, 1], got 1.5\n  neither prompt nor messages\n",
        )
        assert (as_json.code, as_json.out) == (2, "")
        assert json.loads(as_json.err) == {
            "error": {
                "code": "INVALID_ARGUMENT",
                "reason": "SOME_REASON",
                "message": "2 violations",
                "retry_after": None,
                "request_id": None,
                "violations": [
                    {"field": "top_p", "description": "must be in (0, 1], got 1.5"},
                    {"field": "", "description": "neither prompt nor messages"},
                ],
            }
        }

    async def test_nobody_listening_says_what_to_do(self) -> None:
        """A server that is not there is named, with the way to start one."""
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{unused.getsockname()[1]}"
            result = await run(address, "generate", "Hi")
        assert (result.code, result.out) == (3, "")
        assert f"no connection to {address}" in result.err
        assert "make run" in result.err

    async def test_a_bad_key_is_not_shown(self, server: ScriptedServer) -> None:
        """A key that no header can carry is a usage error that does not repeat it."""
        result = await run(server.address, "card", LLAMA2_API_KEY="s3crét")
        assert result.code == 2
        assert "s3cr" not in result.err

    async def test_an_error_after_text_starts_its_own_line(self, server: ScriptedServer) -> None:
        """A reply that breaks off keeps what came, and the error begins a new line."""
        server.refuses(grpc.StatusCode.INTERNAL, "the engine failed", after=("Half a",))
        assert await run(server.address, "generate", "Hi") == Result(
            1, "Half a\n", "error: the server failed: the engine failed\n"
        )


class TestOtherCommands:
    async def test_usage_is_a_table(self, server: ScriptedServer) -> None:
        """A line for each day and model below what is left of the quota; --json has it all; days are checked."""
        days = ("--since", "2026-11-02", "--until", "2026-11-30")
        table, whole, wrong = await asyncio.gather(
            run(server.address, "usage", *days),
            run(server.address, "usage", *days, "--json"),
            run(server.address, "usage", "--since", "yesterday"),
        )
        assert table.out.splitlines() == [
            "account 42: 3 of 5 requests a minute left, all of them in 60 s",
            "date        model                          requests  tokens in  tokens out  from cache  neurons",
            "2026-11-22  @cf/meta/llama-2-7b-chat-fp16     1,234         20          13           0  12.1176",
            "2026-11-23  @cf/meta/llama-2-7b-chat-fp16         1          0           0          33        0",
        ]
        assert ParseDict(json.loads(whole.out), account_pb2.GetUsageResponse()) == USAGE
        assert server.requests == [account_pb2.GetUsageRequest(since="2026-11-02", until="2026-11-30")] * 2
        assert (table.code, whole.code, wrong.code) == (0, 0, 2)

    async def test_card_is_readable(self, server: ScriptedServer) -> None:
        """The card's summary has its name, limits, quota and prices; --json has the whole card."""
        summary, whole = await asyncio.gather(run(server.address, "card"), run(server.address, "card", "--json"))
        for words in ("@cf/meta/llama-2-7b-chat-fp16", "3072 tokens", "5 requests a minute", "0.3672 neurons"):
            assert words in summary.out
        card = json.loads(whole.out)
        assert card["limits"]["context_length_limit"] == 3072
        assert card["generation_defaults"]["top_k"] == 0

    async def test_tokens_are_counted(self, server: ScriptedServer) -> None:
        """`tokens` tells the count and what it leaves, for people or as JSON."""
        plain, as_json = await asyncio.gather(
            run(server.address, "tokens", "Hi"),
            run(server.address, "tokens", "-", "--raw", "--json", stdin=b"Hi"),
        )
        assert plain.out == "20 input tokens; room for 2500 output tokens\n"
        assert json.loads(as_json.out) == {"input_tokens": 20, "max_output_tokens": 2500}
        assert text_generation_pb2.CountTokensRequest(prompt="Hi", raw=True) in server.requests

    async def test_health_is_an_exit_code(self, server: ScriptedServer) -> None:
        """`health` prints the status, and scripts can go by the exit code."""
        serving, tired, nobody = await asyncio.gather(
            run(server.address, "health"),
            run(server.address, "health", "tired"),
            run(server.address, "health", "nobody", "--json"),
        )
        assert serving == Result(0, "SERVING\n", "")
        assert tired == Result(3, "NOT_SERVING\n", "")
        assert nobody == Result(2, '{"service": "nobody", "status": "SERVICE_UNKNOWN"}\n', "")


class TestChat:
    async def test_ctrl_c_stops_the_reply_and_not_the_program(self, server: ScriptedServer) -> None:
        """Ctrl-C cancels the call, the stopped turn is forgotten, and the conversation goes on."""
        server.says("One.")
        server.hangs(after=("Half a",))
        server.says("Three.")
        async with Terminal.running(server.address, "chat", "--system", "Be brief.") as (terminal, process):
            await terminal.until("> ")
            terminal.type("first\n")
            await terminal.until("One.")
            await terminal.until("> ")
            terminal.type("second\n")
            await terminal.until("Half a")
            terminal.type("\x03")
            await terminal.until("Stopped")
            await asyncio.wait_for(server.cancelled.wait(), 5)
            await terminal.until("> ")
            await terminal.press("half typed\x03", "> ")
            terminal.type("third\n")
            await terminal.until("Three.")
            await terminal.until("> ")
            terminal.type("\x04")
            assert await asyncio.wait_for(process.wait(), 10) == 0
        assert server.requests[2] == text_generation_pb2.GenerateRequest(
            messages=[
                text_generation_pb2.Message(role="system", content="Be brief."),
                text_generation_pb2.Message(role="user", content="first"),
                text_generation_pb2.Message(role="assistant", content="One."),
                text_generation_pb2.Message(role="user", content="third"),
            ]
        )

    async def test_an_error_does_not_end_the_conversation(self, server: ScriptedServer) -> None:
        """A refused turn is told and forgotten; /clear forgets the rest, /help lists the commands, /exit leaves."""
        server.says("One.")
        server.refuses(grpc.StatusCode.RESOURCE_EXHAUSTED, "line full", RETRY_IN_11_SECONDS)
        server.says("Three.")
        async with Terminal.running(server.address, "chat") as (terminal, process):
            await terminal.until("> ")
            terminal.type("first\n")
            await terminal.until("One.")
            terminal.type("second\n")
            await terminal.until("retry in 11 s")
            terminal.type("/help\n")
            await terminal.until("print this list")
            terminal.type("/clear\n")
            await terminal.until("Forgotten.")
            terminal.type("third\n")
            await terminal.until("Three.")
            terminal.type("/exit\n")
            assert await asyncio.wait_for(process.wait(), 10) == 0
        assert server.requests[2] == text_generation_pb2.GenerateRequest(
            messages=[text_generation_pb2.Message(role="user", content="third")]
        )

    async def test_lines_of_a_script_are_turns(self, server: ScriptedServer) -> None:
        """Without a terminal each line is a turn, empty ones apart, and the first error ends it with its exit code."""
        server.says("One.", completion=COMPLETION)
        server.refuses(grpc.StatusCode.UNAUTHENTICATED)
        result = await run(server.address, "chat", "--json", "--seed", "1", stdin=b"first\n\nsecond\nthird")
        assert result.code == 5
        assert [json.loads(line) for line in result.out.splitlines()] == [
            {"response": "One."},
            {"response": "", "completion": COMPLETION_JSON},
        ]
        assert json.loads(result.err)["error"]["code"] == "UNAUTHENTICATED"
        assert len(server.requests) == 2


class TestMutualTls:
    async def test_shows_a_client_certificate(self, tmp_path: Path) -> None:
        """--ca, --certificate and --key reach a server that asks for a client certificate; without, nobody."""
        authority = Authority(tmp_path)
        certificate, key = authority.pair()
        credentials = grpc.ssl_server_credentials(
            [(key.read_bytes(), certificate.read_bytes())], authority.root, require_client_auth=True
        )
        shown = ["--certificate", str(certificate), "--key", str(key)]
        async with ScriptedServer.running(credentials=credentials) as server:
            ca = ["--ca", str(authority.root_file())]
            assert (await run(server.address, *ca, *shown, "generate", "Hi")).code == 0
            refused = await run(server.address, *ca, "generate", "Hi")
            assert refused.code == 3

    async def test_refuses_an_authority_that_is_none(self, tmp_path: Path) -> None:
        """A file that is no certificate is named as wrong usage, and not told as a server that is not there."""
        path = tmp_path / "ca.pem"
        path.write_text("no certificate")
        result = await run("localhost:1", "--ca", str(path), "health")
        assert result.code == 2
        assert f"--ca: {path} holds no PEM certificate" in result.err

    async def test_refuses_files_that_are_no_pair(self, tmp_path: Path) -> None:
        """A certificate without its key, or with another's, is named at once."""
        certificate, _ = Authority(tmp_path).pair()
        (tmp_path / "other").mkdir()
        _, other_key = Authority(tmp_path / "other").pair()
        alone = await run("127.0.0.1:1", "--certificate", str(certificate), "health")
        assert alone.code == 2
        assert "Give --certificate and --key together" in alone.err
        both = ["--certificate", str(certificate), "--key", str(other_key)]
        mismatched = await run("127.0.0.1:1", *both, "health")
        assert mismatched.code == 2
        assert "are no pair of PEM files" in mismatched.err
