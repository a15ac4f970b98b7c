"""`Client.stream`: the text while it is generated, the reply after its end, and errors."""

from __future__ import annotations

import grpc
import pytest
from tests.integration.client.samples import EVERY_OPTION, REPLY
from tests.support.scripted_server import ScriptedServer

from llama2_client import Client, InternalError


async def test_yields_deltas_then_has_the_reply(client: Client) -> None:
    """The stream yields the deltas as sent; after its end, `reply` equals the reply of `generate`."""
    stream = client.stream("Hi")
    deltas = [delta async for delta in stream]
    assert deltas == ["Hello", " world"]
    assert stream.reply == REPLY
    assert [delta async for delta in stream] == []


async def test_has_no_reply_before_its_end(client: Client, server: ScriptedServer) -> None:
    """While a stream is in progress, `reply` raises RuntimeError and `text` has the text so far."""
    server.script_hang(after=("Once",))
    async with client.stream("Hi") as stream:
        assert await anext(stream) == "Once"
        assert stream.text == "Once"
        with pytest.raises(RuntimeError, match="the reply is not complete; read the stream to its end"):
            _ = stream.reply


async def test_sends_the_request_of_generate(client: Client, server: ScriptedServer) -> None:
    """The request of a stream has the same fields as the request of `generate`."""
    async with client.stream("Hi", **EVERY_OPTION) as stream:
        await anext(stream)
    await client.generate("Hi", **EVERY_OPTION)
    assert server.requests[0] == server.requests[1]


async def test_an_error_after_text_is_raised_after_the_text(client: Client, server: ScriptedServer) -> None:
    """The stream yields the text before an error, then raises the error."""
    server.script_error(grpc.StatusCode.INTERNAL, "the engine failed", after=("Once", " upon"))
    stream = client.stream("Hi")
    assert [await anext(stream), await anext(stream)] == ["Once", " upon"]
    with pytest.raises(InternalError, match="the engine failed"):
        await anext(stream)
    assert stream.closed


async def test_an_end_without_completion_is_an_error(client: Client, server: ScriptedServer) -> None:
    """A stream that ends without its completion raises InternalError."""
    server.script_reply("Once", completion=None)
    with pytest.raises(InternalError, match="the server ended the stream without a completion"):
        async for _ in client.stream("Hi"):
            pass
