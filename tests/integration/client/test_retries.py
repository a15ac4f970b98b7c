"""Retries: which failed calls gRPC repeats, and how often."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from tests.integration.client.samples import REPLY
from tests.support.scripted_server import ScriptedServer

from llama2_client import Client, QueueFull, Unavailable


async def test_unavailable_is_retried_before_the_first_message(client: Client, server: ScriptedServer) -> None:
    """A call to a server that is unavailable for a short time is repeated, for whole replies and for streams."""
    for _ in range(3):
        server.script_error(grpc.StatusCode.UNAVAILABLE, pushback_ms=1)
    server.script_reply("Hello", " world")
    assert await client.generate("Hi") == REPLY
    assert len(server.requests) == 4

    server.script_error(grpc.StatusCode.UNAVAILABLE, pushback_ms=1)
    server.script_reply("Hello", " world")
    assert "".join([delta async for delta in client.stream("Hi")]) == "Hello world"


async def test_nothing_is_retried_after_the_first_message(server: ScriptedServer) -> None:
    """Without `resume`, an error after the first text is raised: the reply does not start again."""
    server.script_error(grpc.StatusCode.UNAVAILABLE, after=("Once",), pushback_ms=1)
    async with Client(server.address, timeout=10, resume=False) as client:
        stream = client.stream("Hi")
        assert await anext(stream) == "Once"
        with pytest.raises(Unavailable):
            await anext(stream)
    assert len(server.requests) == 1


async def test_a_call_has_at_most_five_attempts(client: Client, server: ScriptedServer) -> None:
    """A call to a server that stays unavailable is attempted five times."""
    server.script_error(grpc.StatusCode.UNAVAILABLE, pushback_ms=1)
    with pytest.raises(Unavailable):
        await client.count_tokens("Hi")
    assert len(server.requests) == 5


async def test_a_call_cut_off_by_a_stopping_server_is_retried(client: Client, server: ScriptedServer) -> None:
    """A call that reaches a stopping gRPC server ends with CANCELLED before any handler runs."""
    server.script_error(grpc.StatusCode.CANCELLED)
    server.script_reply("Hello", " world")
    assert await client.generate("Hi") == REPLY


async def test_a_negative_pushback_prevents_retries(client: Client, server: ScriptedServer) -> None:
    """If the server sends a negative pushback, the client does not retry."""
    server.script_error(grpc.StatusCode.UNAVAILABLE, pushback_ms=-1)
    with pytest.raises(Unavailable):
        await client.model_card()
    assert len(server.requests) == 1


async def test_other_codes_are_not_retried(client: Client, server: ScriptedServer) -> None:
    """A full queue is not retried: retries would make it longer."""
    server.script_error(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "queue full",
        error_details_pb2.RetryInfo(retry_delay=Duration(nanos=1_000_000)),
        pushback_ms=1,
    )
    with pytest.raises(QueueFull):
        await client.generate("Hi")
    assert len(server.requests) == 1
