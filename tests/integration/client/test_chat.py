"""`Chat`: each turn sends the completed turns before it."""

from __future__ import annotations

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
