"""The commands of `llama2 chat` in a terminal, and pasted text."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from tests.integration.client.cli.terminal import Terminal
from tests.support.scripted_server import ScriptedServer

from llama2.v1 import account_pb2, text_generation_pb2

PASTE_START, PASTE_END = "\x1b[200~", "\x1b[201~"


@contextlib.asynccontextmanager
async def conversation(server: ScriptedServer, *arguments: str, term: str = "dumb") -> AsyncIterator[Terminal]:
    """Start a chat, and leave it with /exit at the end of the block."""
    async with Terminal.running(server.address, "chat", *arguments, term=term) as (terminal, process):
        await terminal.until("> ")
        yield terminal
        terminal.type("/exit\n")
        assert await asyncio.wait_for(process.wait(), 60) == 0


def messages(request: object) -> list[tuple[str, str]]:
    """Return the roles and the texts of a request."""
    assert isinstance(request, text_generation_pb2.GenerateRequest)
    return [(message.role, message.content) for message in request.messages]


async def test_a_pasted_text_of_several_lines_is_one_turn(server: ScriptedServer) -> None:
    """The terminal's marks of pasted text keep its lines together until Enter; then the next line is another turn."""
    server.script_reply("One.")
    server.script_reply("Two.")
    pasted = "first line\n\n  second: żółw 🦊\n/clear\nlast"
    async with conversation(server, term="xterm") as terminal:
        terminal.type(f"{PASTE_START}{pasted}{PASTE_END}\n")
        await terminal.until("One.")
        await terminal.until("> ")
        terminal.type("typed\n")
        await terminal.until("Two.")
        await terminal.until("> ")
    assert messages(server.requests[0]) == [("user", pasted)]
    assert messages(server.requests[1]) == [("user", pasted), ("assistant", "One."), ("user", "typed")]


async def test_retry_replaces_the_last_answer(server: ScriptedServer) -> None:
    """/retry asks the last question again with another seed; the old answer is not sent."""
    for reply in ("One.", "Two.", "Other two."):
        server.script_reply(reply)
    async with conversation(server, "--seed", "1") as terminal:
        terminal.type("/retry\n")
        await terminal.until("Nothing to retry: the conversation has no turn yet.")
        for text, reply in (("first", "One."), ("second", "Two."), ("/retry", "Other two."), ("third", "Other two.")):
            terminal.type(f"{text}\n")
            await terminal.until(reply)
            await terminal.until("> ")
    repeated, last = server.requests[2], server.requests[3]
    assert messages(repeated) == messages(server.requests[1])
    assert isinstance(repeated, text_generation_pb2.GenerateRequest)
    assert repeated.seed != 1
    assert messages(last)[2:] == [("user", "second"), ("assistant", "Other two."), ("user", "third")]


async def test_retry_repeats_a_failed_turn(server: ScriptedServer) -> None:
    """After an error, /retry asks the question that failed."""
    server.script_reply("One.")
    server.script_error(grpc.StatusCode.INTERNAL, "the engine failed")
    server.script_reply("Two.")
    async with conversation(server) as terminal:
        terminal.type("first\n")
        await terminal.until("One.")
        terminal.type("second\n")
        await terminal.until("the engine failed")
        terminal.type("/retry\n")
        await terminal.until("Two.")
        await terminal.until("> ")
    assert messages(server.requests[2]) == [("user", "first"), ("assistant", "One."), ("user", "second")]


async def test_system_changes_the_system_message(server: ScriptedServer) -> None:
    """/system TEXT sets the system message for the next turns; /system shows it."""
    async with conversation(server) as terminal:
        terminal.type("/system\n")
        await terminal.until("The card's default system message.")
        terminal.type("/system You are a pirate.\n")
        await terminal.until("System message set.")
        terminal.type("/system\n")
        await terminal.until("System message: You are a pirate.")
        terminal.type("Ahoy\n")
        await terminal.until("Hello world")
        await terminal.until("> ")
    assert messages(server.requests[0]) == [("system", "You are a pirate."), ("user", "Ahoy")]


async def test_save_writes_the_conversation(server: ScriptedServer, tmp_path: Path) -> None:
    """/save FILE writes the messages as JSON, as --messages reads them, and never overwrites a file."""
    file = tmp_path / "my story.json"
    async with conversation(server, "--system", "Be brief.") as terminal:
        terminal.type("żółw\n")
        await terminal.until("Hello world")
        terminal.type("/save\n")
        await terminal.until("/save: the file is missing, as in /save story.json")
        terminal.type(f"/save {file}\n")
        await terminal.until(f"Saved 3 messages to {file}.")
        terminal.type(f"/save {file}\n")
        await terminal.until("exists; choose another name")
        terminal.type(f"/save {tmp_path}/missing/story.json\n")
        await terminal.until("(No such file or directory); choose another file")
        await terminal.until("> ")
    assert json.loads(file.read_text()) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "żółw"},
        {"role": "assistant", "content": "Hello world"},
    ]


async def test_a_saved_conversation_continues(server: ScriptedServer, tmp_path: Path) -> None:
    """`chat --messages FILE` sends the saved turns before a new one; --system replaces the saved system message."""
    file = tmp_path / "story.json"
    saved = [("system", "Be brief."), ("user", "żółw"), ("assistant", "Hello world")]
    file.write_text(json.dumps([{"role": role, "content": content} for role, content in saved]))
    for reply in ("Again.", "More.", "Kind."):
        server.script_reply(reply)
    async with conversation(server, "--messages", str(file)) as terminal:
        terminal.type("/retry\n")
        await terminal.until("Again.")
        await terminal.until("> ")
        terminal.type("next\n")
        await terminal.until("More.")
        await terminal.until("> ")
    assert messages(server.requests[0]) == saved[:2]
    assert messages(server.requests[1]) == [*saved[:2], ("assistant", "Again."), ("user", "next")]
    async with conversation(server, "--messages", str(file), "--system", "Be kind.") as terminal:
        terminal.type("next\n")
        await terminal.until("Kind.")
        await terminal.until("> ")
    assert messages(server.requests[2]) == [("system", "Be kind."), *saved[1:], ("user", "next")]


async def test_usage_shows_the_conversation_and_the_account(server: ScriptedServer) -> None:
    """/usage prints the tokens and neurons of the completed turns, the quota, the budget and today's usage."""
    async with conversation(server) as terminal:
        for _ in range(2):
            terminal.type("Hi\n")
            await terminal.until("Hello world")
            await terminal.until("> ")
        terminal.type("/usage\n")
        await terminal.until("This conversation: 2 completed turns, 40 in, 26 out, 24.2352 neurons.")
        await terminal.until("account 42: 3 of 5 requests per minute left; full again in 60 s")
        await terminal.until("budget: 12.1176 of 1000 neurons of this month spent, 93.3 reserved")
        await terminal.until("> ")
    request = server.requests[2]
    assert isinstance(request, account_pb2.GetUsageRequest)
    assert request.HasField("since")


async def test_a_failed_usage_call_does_not_end_the_conversation(server: ScriptedServer) -> None:
    """An error of /usage is printed, and the conversation continues."""
    server.script_error(grpc.StatusCode.UNAUTHENTICATED)
    async with conversation(server) as terminal:
        terminal.type("/usage\n")
        await terminal.until("not authenticated; set a valid key with LLAMA2_API_KEY or --api-key")
        await terminal.until("> ")


@pytest.mark.parametrize("text", ["/etc/hosts is a file", "/ what", "//"])
async def test_a_text_that_starts_with_a_slash_is_a_turn(server: ScriptedServer, text: str) -> None:
    """Only a slash and one word of letters is a command; an unknown command is not sent."""
    async with conversation(server) as terminal:
        terminal.type("/unknown words\n")
        await terminal.until("Unknown command /unknown; /help lists the commands.")
        terminal.type(f"{text}\n")
        await terminal.until("Hello world")
        await terminal.until("> ")
    assert messages(server.requests[0]) == [("user", text)]
