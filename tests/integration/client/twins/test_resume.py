"""Streams that break off continue, by default, and each character is yielded once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from tests.integration.client.twins.twin import Twin
from tests.support.scripted_server import ScriptedServer

from llama2.v1 import text_generation_pb2 as pb
from llama2_client import Client, FailedPrecondition, Llama2Error, QueueFull, SyncClient, Unavailable

Kind = type[Client] | type[SyncClient]


@pytest.fixture
async def twin(kind: Kind, server: ScriptedServer) -> AsyncIterator[Twin]:
    """Connect a client with the default options."""
    async with Twin.connected(kind, server.address, timeout=60) as twin:
        yield twin


def positions(server: ScriptedServer) -> list[int]:
    """Return the characters after which each call continued."""
    return [request.resume_after_characters for request in server.requests if isinstance(request, pb.GenerateRequest)]


async def test_a_broken_stream_continues(twin: Twin, server: ScriptedServer) -> None:
    """The same request with the same key asks for the rest by code points, and no text is yielded twice."""
    server.script_error(grpc.StatusCode.UNAVAILABLE, after=("Hel",))
    server.script_error(grpc.StatusCode.UNAVAILABLE, after=("l", "o🦊"))
    server.script_reply(" w", "orld")
    deltas: list[str] = []
    reply = await twin.read(deltas, "Hi")
    assert deltas == ["Hel", "l", "o🦊", " w", "orld"]
    assert reply.text == "Hello🦊 world"
    assert positions(server) == [0, 3, 6]
    for request in server.requests:
        assert isinstance(request, pb.GenerateRequest)
        request.ClearField("resume_after_characters")
    assert server.requests == [pb.GenerateRequest(prompt="Hi")] * 3
    assert len(set(server.keys)) == 1
    assert len(server.keys[0]) == 32


async def test_a_stream_that_breaks_before_its_completion(twin: Twin, server: ScriptedServer) -> None:
    """The client has the whole text, and gets only the completion."""
    server.script_error(grpc.StatusCode.UNAVAILABLE, after=("Hello",))
    server.script_reply()
    deltas: list[str] = []
    assert (await twin.read(deltas, "Hi")).text == "Hello"
    assert (deltas, positions(server)) == (["Hello"], [0, 5])


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL])
async def test_a_reset_stream_continues(twin: Twin, server: ScriptedServer, code: grpc.StatusCode) -> None:
    """A stream that a proxy resets ends with these codes; the same code of the service is an error."""
    server.script_error(code, "Received RST_STREAM with error code 2", after=("Hello",))
    server.script_reply(" world")
    deltas: list[str] = []
    await twin.read(deltas, "Hi")
    assert deltas == ["Hello", " world"]
    server.script_error(code, "the engine failed", after=("Hello",))
    server.script_reply(" world")
    await twin.read([], "another script")
    with pytest.raises(Llama2Error, match="the engine failed"):
        await twin.read([], "Hi")


async def test_calls_have_different_keys(twin: Twin, server: ScriptedServer) -> None:
    """Each call of the program has its own key; a given seed is kept, and no seed is chosen."""
    await twin.call("generate", "Hi", seed=7)
    await twin.call("generate", "Hi")
    await twin.read([], "Hi")
    assert server.requests == [pb.GenerateRequest(prompt="Hi", seed=7), *[pb.GenerateRequest(prompt="Hi")] * 2]
    assert len(set(server.keys)) == 3


async def test_another_model_is_an_error(twin: Twin, server: ScriptedServer) -> None:
    """If the server cannot compute the rest, the stream fails instead of mixing texts."""
    server.script_error(grpc.StatusCode.UNAVAILABLE, after=("Hello",))
    server.script_error(grpc.StatusCode.FAILED_PRECONDITION, "another model")
    deltas: list[str] = []
    with pytest.raises(FailedPrecondition, match="another model"):
        await twin.read(deltas, "Hi")
    assert deltas == ["Hello"]


async def test_an_older_server_cannot_repeat_text(twin: Twin, server: ScriptedServer) -> None:
    """A server without keys sends the text from its start; the client raises the error of the break instead."""
    server.knows_keys = False
    server.script_error(grpc.StatusCode.UNAVAILABLE, "broken", after=("Hello",))
    server.script_reply("Hello", " world")
    deltas: list[str] = []
    with pytest.raises(Unavailable, match="broken"):
        await twin.read(deltas, "Hi")
    assert deltas == ["Hello"]
    await twin.read(deltas, "Hi")
    assert deltas == ["Hello", "Hello", " world"]


async def test_a_stream_is_resumed_as_often_as_it_is_free(twin: Twin, server: ScriptedServer) -> None:
    """A server computes a reply again three times without a price; then the stream fails."""
    server.script_error(grpc.StatusCode.UNAVAILABLE, after=("Hello",))
    with pytest.raises(Unavailable):
        await twin.read([], "Hi")
    assert positions(server) == [0, 5, 10, 15]


async def test_a_full_queue_is_waited_for(twin: Twin, server: ScriptedServer) -> None:
    """After a restart, the queue can reject the rest of a reply for a while."""
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(nanos=1_000_000))
    server.script_error(grpc.StatusCode.UNAVAILABLE, after=("Hello",))
    for _ in range(5):
        server.script_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry)
    server.script_reply(" world")
    deltas: list[str] = []
    await twin.read(deltas, "Hi")
    assert deltas == ["Hello", " world"]


async def test_a_full_queue_ends_a_stream_without_a_deadline(kind: Kind, server: ScriptedServer) -> None:
    """Without a deadline, the client does not wait for the queue again and again."""
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(nanos=1_000_000))
    server.script_error(grpc.StatusCode.UNAVAILABLE, after=("Hello",))
    server.script_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry)
    async with Twin.connected(kind, server.address, timeout=None) as twin:
        with pytest.raises(QueueFull):
            await asyncio.wait_for(twin.read([], "Hi"), 60)


async def test_without_resume_a_broken_stream_is_an_error(kind: Kind, server: ScriptedServer) -> None:
    """With `resume=False`, a stream that breaks off is not repeated, and no call has a key."""
    server.script_error(grpc.StatusCode.UNAVAILABLE, after=("Hello",))
    server.script_reply("Hello")
    async with Twin.connected(kind, server.address, timeout=60, resume=False) as twin:
        with pytest.raises(Unavailable):
            await twin.read([], "Hi")
        await twin.read([], "Hi")
        await twin.call("generate", "Hi")
    assert server.keys == [""] * 3
