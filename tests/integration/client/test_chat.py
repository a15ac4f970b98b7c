"""`Chat`: each turn sends the completed turns before it."""

from __future__ import annotations

import re

import grpc
import pytest
from tests.support.scripted_server import ScriptedServer

from llama2.v1 import text_generation_pb2
from llama2_client import Client, Llama2Error, Message


async def test_each_turn_sends_the_turns_before_it(client: Client, server: ScriptedServer) -> None:
    """A turn sends the system message, the earlier turns and the new question, in this order."""
    server.script_reply("Ahoy!")
    server.script_reply("To the ", "isle.")
    chat = client.chat(system="You are a pirate.", seed=1)
    assert (await chat.send("Hello?")).text == "Ahoy!"
    assert "".join([delta async for delta in chat.stream("Where to?", temperature=0)]) == "To the isle."
    assert server.requests[1] == text_generation_pb2.GenerateRequest(
        messages=[
            text_generation_pb2.ChatMessage(role="system", content="You are a pirate."),
            text_generation_pb2.ChatMessage(role="user", content="Hello?"),
            text_generation_pb2.ChatMessage(role="assistant", content="Ahoy!"),
            text_generation_pb2.ChatMessage(role="user", content="Where to?"),
        ],
        seed=1,
        temperature=0,
    )
    assert chat.history[-2:] == (Message("user", "Where to?"), Message("assistant", "To the isle."))


async def test_a_turn_closed_early_leaves_no_trace(client: Client, server: ScriptedServer) -> None:
    """The history does not contain a turn whose stream is closed before its end."""
    server.script_reply("One.")
    server.script_hang(after=("Half a",))
    server.script_reply("Three.")
    chat = client.chat()
    await chat.send("1")
    async with chat.stream("2") as stream:
        await anext(stream)
    await chat.send("3")
    assert [message.content for message in chat.history] == ["1", "One.", "3", "Three."]


async def test_a_failed_turn_leaves_no_trace(client: Client, server: ScriptedServer) -> None:
    """The history does not contain a turn that fails, before or after the first text."""
    server.script_error(grpc.StatusCode.RESOURCE_EXHAUSTED)
    server.script_error(grpc.StatusCode.INTERNAL, after=("Half a",))
    server.script_reply("Three.")
    chat = client.chat()
    for text in ("1", "2"):
        with pytest.raises(Llama2Error):
            await chat.send(text)
    await chat.send("3")
    assert [message.content for message in chat.history] == ["3", "Three."]


async def test_turns_run_one_at_a_time(client: Client, server: ScriptedServer) -> None:
    """A second turn while one is open is rejected, because its position in the history would be undefined."""
    server.script_hang(after=("Once",))
    chat = client.chat()
    async with chat.stream("1") as stream:
        await anext(stream)
        with pytest.raises(RuntimeError, match="the previous turn is still open"):
            chat.stream("2")


async def test_clear_removes_the_turns(client: Client) -> None:
    """`clear` removes the turns and keeps the system message."""
    chat = client.chat("Be brief.")
    await chat.send("Hi")
    chat.clear()
    assert chat.history == (Message("system", "Be brief."),)


@pytest.mark.parametrize(
    ("saved", "problem"),
    [
        ([("user", "1")], "messages: the last one is a question without an answer; remove it and ask it again"),
        ([("assistant", "1")], "messages[0].role: must be 'user', not 'assistant'"),
        ([("system", "1"), ("system", "2")], "messages[1].role: must be 'user', not 'system'"),
        ([("user", "1"), ("user", "2")], "messages[1].role: must be 'assistant', not 'user'"),
    ],
)
async def test_only_whole_turns_are_restored(client: Client, saved: list[tuple[str, str]], problem: str) -> None:
    """A list that is not a conversation's history is rejected by its field, and the history stays as it was."""
    chat = client.chat("Be brief.")
    with pytest.raises(ValueError, match=re.escape(problem)):
        chat.restore([{"role": role, "content": content} for role, content in saved])
    assert chat.history == (Message("system", "Be brief."),)


async def test_a_restored_history_equals_the_saved_one(client: Client) -> None:
    """`restore` accepts what `history` returned, as messages or as mappings."""
    saved = [Message("system", "Be brief."), Message("user", "1"), Message("assistant", "One.")]
    chat = client.chat("Be long.")
    chat.restore(saved)
    assert list(chat.history) == saved
    chat.restore([{"role": message.role, "content": message.content} for message in saved[1:]])
    assert list(chat.history) == saved[1:]
