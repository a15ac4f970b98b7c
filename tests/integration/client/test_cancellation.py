"""Cancelled, closed and dropped calls stop on the server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator

import pytest
from tests.support.scripted_server import ScriptedServer

from llama2_client import Client


@contextlib.asynccontextmanager
async def timeout_once_hanging(server: ScriptedServer) -> AsyncIterator[None]:
    """Let an `asyncio.timeout` around the body expire as soon as the server hangs in a call."""
    async with asyncio.timeout(None) as timeout:

        async def expire() -> None:
            await server.hanging.wait()
            timeout.reschedule(asyncio.get_running_loop().time())

        expiry = asyncio.create_task(expire())
        try:
            yield
        finally:
            expiry.cancel()


async def test_leaving_the_block_cancels_the_call(client: Client, server: ScriptedServer) -> None:
    """Leaving `async with` early cancels the call on the server."""
    server.script_hang(after=("Once", " upon"))
    async with client.stream("Hi") as stream:
        await anext(stream)
    await asyncio.wait_for(server.cancelled.wait(), 60)
    assert [delta async for delta in stream] == []


async def test_dropping_the_stream_cancels_the_call(client: Client, server: ScriptedServer) -> None:
    """A loop that breaks without closing the stream also cancels the call on the server."""
    server.script_hang(after=("Once", " upon"))
    async for _ in client.stream("Hi"):
        break
    gc.collect()
    await asyncio.wait_for(server.cancelled.wait(), 60)


async def test_cancelling_the_task_cancels_the_call(client: Client, server: ScriptedServer) -> None:
    """A cancelled task stays cancelled, and its call is cancelled on the server."""
    server.script_hang(after=("Once",))
    reading = asyncio.Event()

    async def read() -> None:
        async for _ in client.stream("Hi"):
            reading.set()

    task = asyncio.create_task(read())
    await reading.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(server.cancelled.wait(), 60)


async def test_closing_from_another_task_ends_the_iteration(client: Client, server: ScriptedServer) -> None:
    """If another task closes the stream, the reader's loop ends, and the reader itself is not cancelled."""
    server.script_hang(after=("Once",))
    stream = client.stream("Hi")
    reading = asyncio.Event()

    async def read() -> list[str]:
        deltas = []
        async for delta in stream:
            deltas.append(delta)
            reading.set()
        return deltas

    task = asyncio.create_task(read())
    await reading.wait()
    await stream.aclose()
    assert await task == ["Once"]
    await asyncio.wait_for(server.cancelled.wait(), 60)


async def test_a_timeout_around_generate_cancels_the_call(client: Client, server: ScriptedServer) -> None:
    """A timeout around `generate` cancels the call on the server and raises TimeoutError."""
    server.script_hang()
    with pytest.raises(TimeoutError):
        async with timeout_once_hanging(server):
            await client.generate("Hi")
    await asyncio.wait_for(server.cancelled.wait(), 60)


async def test_a_cancelled_turn_leaves_no_trace(client: Client, server: ScriptedServer) -> None:
    """The history of a chat does not contain a turn whose task is cancelled."""
    server.script_hang(after=("Half a",))
    chat = client.chat()
    with pytest.raises(TimeoutError):
        async with timeout_once_hanging(server):
            await chat.send("1")
    assert chat.history == ()
