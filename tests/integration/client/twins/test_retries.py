"""The options `max_attempts` and `quota_wait`."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from tests.integration.client.samples import REPLY
from tests.integration.client.twins.twin import Twin
from tests.support.scripted_server import ScriptedServer

from llama2_client import Client, QueueFull, QuotaExceeded, SyncClient, Unavailable

Kind = type[Client] | type[SyncClient]


def script_quota_exceeded(server: ScriptedServer, seconds: int = 0, nanos: int = 0) -> None:
    """Reject a call because the quota is used up for this time."""
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=seconds, nanos=nanos))
    server.script_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "quota", error_details_pb2.QuotaFailure(), retry)


@pytest.mark.parametrize("attempts", [1, 2, 5])
async def test_the_number_of_attempts_is_an_option(kind: Kind, server: ScriptedServer, attempts: int) -> None:
    """A server that stays unavailable gets this number of calls."""
    server.script_error(grpc.StatusCode.UNAVAILABLE, pushback_ms=1)
    async with Twin.connected(kind, server.address, timeout=60, max_attempts=attempts) as twin:
        with pytest.raises(Unavailable):
            await twin.call("generate", "Hi")
    assert len(server.requests) == attempts


async def test_by_default_a_used_up_quota_is_an_error(twin: Twin, server: ScriptedServer) -> None:
    """Without `quota_wait`, QuotaExceeded is raised after one call."""
    script_quota_exceeded(server, nanos=1)
    with pytest.raises(QuotaExceeded):
        await twin.call("generate", "Hi")
    assert len(server.requests) == 1


async def test_calls_wait_for_the_quota(kind: Kind, server: ScriptedServer) -> None:
    """With `quota_wait`, a call, a stream and a chat are sent again when the quota allows it."""
    async with Twin.connected(kind, server.address, timeout=60, quota_wait=5) as twin:
        for _ in range(2):
            script_quota_exceeded(server, nanos=1_000_000)
        server.script_reply("Hello", " world")
        script_quota_exceeded(server, nanos=1_000_000)
        server.script_reply("Hello", " world")
        script_quota_exceeded(server, nanos=1_000_000)
        server.script_reply("Hello", " world")
        assert await twin.call("generate", "Hi") == REPLY
        deltas: list[str] = []
        assert await twin.read(deltas, "Hi") == REPLY
        assert deltas == ["Hello", " world"]
        assert len(await twin.converse("Hi")) == 2
    assert len(server.requests) == 7


async def test_the_wait_for_the_quota_is_limited(kind: Kind, server: ScriptedServer) -> None:
    """A longer wait than `quota_wait`, all waits of a call together, is an error; so is a wait beyond the deadline."""
    async with Twin.connected(kind, server.address, timeout=60, quota_wait=0.01) as twin:
        for nanos in (6_000_000, 6_000_000):
            script_quota_exceeded(server, nanos=nanos)
        with pytest.raises(QuotaExceeded):
            await twin.call("generate", "Hi")
        assert len(server.requests) == 2
    async with Twin.connected(kind, server.address, timeout=10, quota_wait=3600) as twin:
        script_quota_exceeded(server, seconds=11)
        server.script_reply("Hello")
        deltas: list[str] = []
        with pytest.raises(QuotaExceeded):
            await twin.read(deltas, "Hi")


async def test_a_full_queue_is_not_waited_for(kind: Kind, server: ScriptedServer) -> None:
    """`quota_wait` does not repeat calls that a full queue rejects."""
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(nanos=1))
    server.script_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", retry)
    async with Twin.connected(kind, server.address, timeout=60, quota_wait=3600) as twin:
        with pytest.raises(QueueFull):
            await twin.call("generate", "Hi")
    assert len(server.requests) == 1
