"""`llama2 generate`: input, options, output and Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
from pathlib import Path

import pytest
from google.protobuf.json_format import ParseDict
from tests.integration.client.cli.command import COMMAND, COMPLETION_JSON, Result, environment, run
from tests.integration.client.samples import EVERY_OPTION_REQUEST
from tests.support.scripted_server import COMPLETION, ScriptedServer

from llama2.v1 import text_generation_pb2

STOP = ("--stop", "\n", "--stop", "END")


async def test_text_on_stdout_and_statistics_on_stderr(server: ScriptedServer) -> None:
    """Standard output has only the text; standard error has one line of statistics."""
    assert await run(server.address, "generate", "Hi") == Result(
        0,
        "Hello world\n",
        "end of sequence · 20 in (16 reused), 13 out · 12.1176 neurons · queue 0.25 s · first token 0.50 s"
        " · 8.0 tokens/s\n",
    )
    assert server.requests == [text_generation_pb2.GenerateRequest(prompt="Hi")]


async def test_every_option_is_sent(server: ScriptedServer) -> None:
    """The command line can set every field of a request."""
    options = "--raw --max-tokens 7 --temperature 0 --top-p 1 --top-k 0 --seed 18446744073709551615 --no-cache"
    options += " --repetition-penalty 1.5 --frequency-penalty -0.5 --presence-penalty 0 --no-stream"
    result = await run(server.address, "--api-key", "s3cret", "generate", "Hi", *options.split(), *STOP)
    assert (result.code, result.out) == (0, "Hello world\n")
    assert server.metadata[0]["authorization"] == "Bearer s3cret"
    expected = text_generation_pb2.GenerateRequest(raw=True)
    expected.MergeFrom(EVERY_OPTION_REQUEST)
    expected.no_cache = True
    assert server.requests == [expected]


@pytest.mark.parametrize("dash", [[], ["-"]])
async def test_standard_input_is_the_prompt(server: ScriptedServer, dash: list[str]) -> None:
    """Without TEXT or with "-", the prompt is standard input without its final newline, as UTF-8 in every locale."""
    result = await run(server.address, "generate", *dash, stdin="żółw\n🦊\n".encode(), PYTHONIOENCODING="ascii")
    assert result.code == 0
    assert server.requests == [text_generation_pb2.GenerateRequest(prompt="żółw\n🦊")]


async def test_an_argument_precedes_standard_input(server: ScriptedServer) -> None:
    """With TEXT or --messages, standard input is ignored."""
    assert (await run(server.address, "generate", "Hi", stdin=b"piped")).code == 0
    assert server.requests == [text_generation_pb2.GenerateRequest(prompt="Hi")]


async def test_output_is_utf8_in_every_locale(server: ScriptedServer) -> None:
    """Text is printed as UTF-8 even if the locale cannot represent it."""
    server.script_reply("żół", "w 🦊")
    assert (await run(server.address, "generate", "Hi", PYTHONIOENCODING="ascii")).out == "żółw 🦊\n"


async def test_messages_reads_a_conversation_from_a_file(server: ScriptedServer, tmp_path: Path) -> None:
    """--messages sends the conversation in a JSON file; any other file is a usage error."""
    conversation = tmp_path / "conversation.json"
    conversation.write_text('[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]')
    assert (await run(server.address, "generate", "--messages", str(conversation))).code == 0
    conversation.write_text('["Hi"]')
    result = await run(server.address, "generate", "--messages", str(conversation))
    assert (result.code, "does not have the form" in result.err) == (2, True)
    assert server.requests == [
        text_generation_pb2.GenerateRequest(
            messages=[
                text_generation_pb2.ChatMessage(role="system", content="Be brief."),
                text_generation_pb2.ChatMessage(role="user", content="Hi"),
            ]
        )
    ]


async def test_json_is_one_object_per_line(server: ScriptedServer) -> None:
    """With --json, each line is a message of the API in protobuf's JSON form; with --no-stream, one message."""
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
    for line in streamed.out.splitlines():
        ParseDict(json.loads(line), text_generation_pb2.GenerateStreamResponse())
    expected = text_generation_pb2.GenerateResponse(response="Hello world", completion=COMPLETION)
    assert ParseDict(json.loads(whole.out), text_generation_pb2.GenerateResponse()) == expected


async def test_ctrl_c_stops_the_reply(server: ScriptedServer) -> None:
    """Text is printed before the reply ends; Ctrl-C then cancels the call and exits with 130, without a message."""
    server.script_hang(after=("Once\n",))
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
    await asyncio.wait_for(server.cancelled.wait(), 60)


async def test_a_closed_pipe_prints_no_traceback(server: ScriptedServer) -> None:
    """The command prints no traceback if the reader of its output exits early, as `head` does."""
    server.script_reply("one\n", *["x" * 20_000] * 100)
    process = await asyncio.create_subprocess_shell(
        f"{shlex.join(COMMAND)} generate Hi | head -n 1",
        env=environment(server.address),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert await process.communicate() == (b"one\n", b"")


async def test_deeply_nested_messages_are_wrong_usage(tmp_path: Path) -> None:
    """JSON nested deeper than Python's stack is rejected like any other invalid conversation."""
    path = tmp_path / "messages.json"
    path.write_text("[" * 100_000)
    result = await run("", "generate", "--messages", str(path))
    assert (result.code, "is not valid JSON" in result.err) == (2, True)


async def test_text_that_is_not_unicode_is_rejected(server: ScriptedServer) -> None:
    """Bytes that are not UTF-8 are an invalid prompt and cause no traceback."""
    expected = "llama2: TEXT: must be Unicode text, without lone surrogates\n"
    argument, stdin = await asyncio.gather(
        run(server.address, "generate", b"\xff"),
        run(server.address, "generate", "-", stdin=b"\xff"),
    )
    assert argument == stdin == Result(2, "", expected)
