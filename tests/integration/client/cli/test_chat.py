"""`llama2 chat`, in a terminal and in a script."""

from __future__ import annotations

import asyncio
import json

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from tests.integration.client.cli.command import COMPLETION_JSON, run
from tests.integration.client.cli.terminal import Terminal
from tests.support.scripted_server import COMPLETION, ScriptedServer

from llama2.v1 import text_generation_pb2

RETRY_IN_11_SECONDS = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=10, nanos=500_000_000))


async def test_ctrl_c_stops_the_reply_and_not_the_program(server: ScriptedServer) -> None:
    """Ctrl-C cancels the call, the history does not contain the stopped turn, and the conversation continues."""
    server.script_reply("One.")
    server.script_hang(after=("Half a",))
    server.script_reply("Three.")
    async with Terminal.running(server.address, "chat", "--system", "Be brief.") as (terminal, process):
        await terminal.until("> ")
        terminal.type("first\n")
        await terminal.until("One.")
        await terminal.until("> ")
        terminal.type("second\n")
        await terminal.until("Half a")
        terminal.type("\x03")
        await terminal.until("Stopped. The conversation continues without this turn.")
        await asyncio.wait_for(server.cancelled.wait(), 60)
        await terminal.until("> ")
        await terminal.press("half typed\x03", "> ")
        terminal.type("third\n")
        await terminal.until("Three.")
        await terminal.until("> ")
        terminal.type("\x04")
        assert await asyncio.wait_for(process.wait(), 10) == 0
    assert server.requests[2] == text_generation_pb2.GenerateRequest(
        messages=[
            text_generation_pb2.ChatMessage(role="system", content="Be brief."),
            text_generation_pb2.ChatMessage(role="user", content="first"),
            text_generation_pb2.ChatMessage(role="assistant", content="One."),
            text_generation_pb2.ChatMessage(role="user", content="third"),
        ]
    )


async def test_an_error_does_not_end_the_conversation(server: ScriptedServer) -> None:
    """The history does not contain a rejected turn; /help lists the commands, /clear clears, /exit leaves."""
    server.script_reply("One.")
    server.script_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", RETRY_IN_11_SECONDS)
    server.script_reply("Three.")
    async with Terminal.running(server.address, "chat") as (terminal, process):
        await terminal.until("> ")
        terminal.type("first\n")
        await terminal.until("One.")
        terminal.type("second\n")
        await terminal.until("retry in 11 s")
        terminal.type("/help\n")
        await terminal.until("show this list")
        terminal.type("/clear\n")
        await terminal.until("Conversation cleared.")
        terminal.type("third\n")
        await terminal.until("Three.")
        terminal.type("/exit\n")
        assert await asyncio.wait_for(process.wait(), 10) == 0
    assert server.requests[2] == text_generation_pb2.GenerateRequest(
        messages=[text_generation_pb2.ChatMessage(role="user", content="third")]
    )


async def test_lines_of_a_script_are_turns(server: ScriptedServer) -> None:
    """Without a terminal, each non-empty line is one turn, and the first error ends the chat with its exit code."""
    server.script_reply("One.", completion=COMPLETION)
    server.script_error(grpc.StatusCode.UNAUTHENTICATED)
    result = await run(server.address, "chat", "--json", "--seed", "1", stdin=b"first\n\nsecond\nthird")
    assert result.code == 5
    assert [json.loads(line) for line in result.out.splitlines()] == [
        {"response": "One."},
        {"response": "", "completion": COMPLETION_JSON},
    ]
    assert json.loads(result.err)["error"]["code"] == 16
    assert len(server.requests) == 2
