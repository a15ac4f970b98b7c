"""`Client.generate`: the request that it sends and the reply that it returns."""

from __future__ import annotations

import pytest
from tests.integration.client.samples import REPLY
from tests.support.scripted_server import COMPLETION, ScriptedServer

from llama2.v1 import text_generation_pb2
from llama2_client import Client, FinishReason, InvalidRequest, Message


async def test_returns_the_reply_and_its_statistics(client: Client) -> None:
    """A reply has the text and every field of the completion."""
    assert await client.generate("Hi") == REPLY


async def test_unset_options_are_not_sent(client: Client, server: ScriptedServer) -> None:
    """Options that are missing or None are absent from the request."""
    await client.generate("Hi", top_p=None)
    assert server.requests == [text_generation_pb2.GenerateRequest(prompt="Hi")]


async def test_messages_are_sent_in_order(client: Client, server: ScriptedServer) -> None:
    """Messages can be `Message` objects or mappings; a missing key stays unset."""
    await client.generate(messages=[Message("system", "Be brief."), {"role": "user", "content": ""}, {"role": "user"}])
    assert server.requests == [
        text_generation_pb2.GenerateRequest(
            messages=[
                text_generation_pb2.ChatMessage(role="system", content="Be brief."),
                text_generation_pb2.ChatMessage(role="user", content=""),
                text_generation_pb2.ChatMessage(role="user"),
            ]
        )
    ]


async def test_a_string_is_one_stop_text(client: Client, server: ScriptedServer) -> None:
    """`stop` as a string is one text, not one text per letter."""
    await client.generate("Hi", stop="END")
    assert server.requests == [text_generation_pb2.GenerateRequest(prompt="Hi", stop=["END"])]


async def test_values_that_cannot_be_encoded_are_rejected(client: Client, server: ScriptedServer) -> None:
    """Invalid Unicode and numbers out of range raise InvalidRequest with each field, without a call."""
    with pytest.raises(InvalidRequest) as caught:
        await client.generate("\ud800", seed=-1, stop=["\udc00"])
    assert [violation.field for violation in caught.value.violations] == ["prompt", "seed", "stop"]
    assert caught.value.violations[1].description == "must be from 0 to 18446744073709551615, got -1"
    with pytest.raises(InvalidRequest, match="the request cannot be encoded"):
        await client.generate("Hi", max_tokens=2**31)
    with pytest.raises(InvalidRequest) as caught:
        await client.generate(messages=[{"role": "user", "content": "a"}, {"role": "user", "content": "\ud800"}])
    assert [violation.field for violation in caught.value.violations] == ["messages[1].content"]
    assert server.requests == []


async def test_an_unknown_option_is_rejected(client: Client) -> None:
    """A misspelled option raises TypeError instead of being ignored."""
    with pytest.raises(TypeError, match="temprature"):
        await client.generate("Hi", temprature=1.0)  # type: ignore[call-arg]


async def test_an_unknown_finish_reason_is_unspecified(client: Client, server: ScriptedServer) -> None:
    """The finish reason of a newer server does not break the reply."""
    completion = text_generation_pb2.Completion.FromString(COMPLETION.SerializeToString() + b"\x08\x63")
    server.script_reply("Hi", completion=completion)
    assert (await client.generate("Hi")).finish_reason is FinishReason.UNSPECIFIED
