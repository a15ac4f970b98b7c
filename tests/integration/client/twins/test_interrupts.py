"""`SyncClient`: Ctrl-C and a stream that another thread closes. `Client`: several event loops."""

from __future__ import annotations

import asyncio
import signal
import sys

import pytest
from tests.support.scripted_server import ScriptedServer

from llama2_client import Client, SyncClient

CALLS = {
    "generate": "client.generate('Hi')",
    # Without the block, an interrupt of the loop's body closes the stream only when the exception is gone.
    "stream": "with client.stream('Hi') as stream: [print(delta, flush=True) for delta in stream]",
    "chat": "client.chat().send('Hi')",
    "count_tokens": "client.count_tokens('Hi')",
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_ctrl_c_cancels_the_call(server: ScriptedServer, call: str) -> None:
    """Ctrl-C raises KeyboardInterrupt, and the call is cancelled on the server although the process continues."""
    server.script_hang(after=("Once",))
    program = f"""
from llama2_client import SyncClient
client = SyncClient({server.address!r})
try:
    {call}
except KeyboardInterrupt:
    print("interrupted", flush=True)
    input()
"""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    await asyncio.wait_for(server.hanging.wait(), 60)
    process.send_signal(signal.SIGINT)
    if call != CALLS["count_tokens"]:  # its script does not record a cancellation
        await asyncio.wait_for(server.cancelled.wait(), 60)
    assert process.stdout is not None
    assert (await process.stdout.readuntil(b"interrupted\n")).removesuffix(b"interrupted\n") in (b"", b"Once\n")
    await process.communicate(b"\n")
    assert process.returncode == 0


async def test_another_thread_can_close_a_stream(server: ScriptedServer) -> None:
    """If another thread closes the stream, the reader's loop ends without an error."""
    server.script_hang(after=("Once",))
    with SyncClient(server.address, timeout=60) as client:
        stream = client.stream("Hi")
        reader = asyncio.create_task(asyncio.to_thread(list, stream))
        await asyncio.wait_for(server.hanging.wait(), 60)
        stream.close()
        assert await reader == ["Once"]
        await asyncio.wait_for(server.cancelled.wait(), 60)
        assert stream.closed


async def test_threads_share_a_client(server: ScriptedServer) -> None:
    """Several threads can call one client at the same time, over one channel."""
    with SyncClient(server.address, timeout=60) as client:
        replies = await asyncio.gather(*(asyncio.to_thread(client.generate, str(i)) for i in range(8)))
    assert {reply.text for reply in replies} == {"Hello world"}


async def test_a_closed_client_can_be_used_again(server: ScriptedServer) -> None:
    """A closed client opens new connections at the next call."""
    client = SyncClient(server.address, timeout=60)
    for _ in range(2):
        assert (await asyncio.to_thread(client.generate, "Hi")).text == "Hello world"
        client.close()


async def test_one_client_works_in_several_event_loops(server: ScriptedServer) -> None:
    """One async client works across calls of `asyncio.run`, closed or not, and prints no error of gRPC."""
    program = f"""
import asyncio
from llama2_client import Client
client = Client({server.address!r}, timeout=60)

async def call(close):
    print((await client.generate("Hi")).text)
    print("".join([delta async for delta in client.stream("Hi")]))
    unread = client.stream("Hi")
    await anext(unread)
    if close:
        await client.aclose()

for close in (False, True, False):
    asyncio.run(call(close))
"""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert (process.returncode, out.decode(), err) == (0, "Hello world\n" * 6, b"")


async def test_one_client_works_in_two_loops_at_once(server: ScriptedServer) -> None:
    """Event loops in two threads can share a client."""
    client = Client(server.address, timeout=60)

    async def call() -> str:
        async with client:
            return (await client.generate("Hi")).text

    assert set(await asyncio.gather(call(), asyncio.to_thread(asyncio.run, call()))) == {"Hello world"}
