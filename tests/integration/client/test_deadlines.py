"""Deadlines: the client's default, the deadline of a single call, and their expiry."""

from __future__ import annotations

import asyncio
import math

import pytest
from tests.support.scripted_server import ScriptedServer

from llama2_client import Client, DeadlineExceeded


async def test_a_call_can_override_the_default_deadline(server: ScriptedServer) -> None:
    """The server receives the client's deadline, or the deadline of the call if it has one."""
    async with Client(server.address, timeout=1000) as client:
        await client.generate("Hi")
        await client.generate("Hi", timeout=10_000)
        async for _ in client.stream("Hi", timeout=10_000):
            pass
    default, own, streamed = (remaining or 0 for remaining in server.remaining_seconds)
    assert default == pytest.approx(1000, rel=0.2)  # gRPC rounds the deadline that it sends
    assert own == pytest.approx(10_000, rel=0.2)
    assert streamed == pytest.approx(10_000, rel=0.2)


async def test_none_is_no_deadline(server: ScriptedServer) -> None:
    """With `timeout=None`, a call has no deadline."""
    async with Client(server.address, timeout=None) as client:
        await client.generate("Hi")
    assert server.remaining_seconds == [None]


async def test_an_infinite_timeout_is_no_deadline(client: Client, server: ScriptedServer) -> None:
    """Infinity and extremely long timeouts mean no deadline; NaN is rejected."""
    await client.generate("Hi", timeout=math.inf)
    await client.generate("Hi", timeout=1e300)
    assert server.remaining_seconds == [None, None]
    with pytest.raises(ValueError, match="timeout: must be a number of seconds, got nan"):
        Client(timeout=math.nan)


async def test_a_deadline_that_has_passed_is_raised(client: Client, server: ScriptedServer) -> None:
    """A call that has no time left raises DeadlineExceeded."""
    server.script_hang()
    with pytest.raises(DeadlineExceeded):
        await client.generate("Hi", timeout=0)


async def test_an_expired_call_is_cancelled_on_the_server(client: Client, server: ScriptedServer) -> None:
    """A call that exceeds its deadline raises DeadlineExceeded and is cancelled on the server.

    gRPC's deadlines have no virtual time. On a slow machine, a deadline could pass before the call reaches the server.
    Then the test repeats the call with twice the time.
    """
    server.script_hang()
    timeout = 0.5
    while not server.hanging.is_set():
        with pytest.raises(DeadlineExceeded):
            await client.generate("Hi", timeout=timeout)
        timeout *= 2
    await asyncio.wait_for(server.cancelled.wait(), 60)
