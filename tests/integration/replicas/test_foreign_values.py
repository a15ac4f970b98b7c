"""Values in Redis that no replica of this version wrote: a reply never depends on them."""

from typing import Any

import pytest
from tests.integration.replicas.conftest import (
    REPLY,
    STORY,
    Replicas,
    follow,
    names_of,
    prefills,
    redis_client,
    rest_of,
)
from tests.support.servers.redis_server import RedisServer
from tests.support.service import hold_slot

from llama2.v1 import text_generation_pb2 as pb
from llama2_server import redis_client as redis_client_module
from llama2_server.generation.replicas import leases

LEASE = {"owner": "other", "seed": 7, "fingerprint": "", "length": 0}
VALUES: list[tuple[str, Any]] = [
    ("", b"\xff"),
    ("", ["a", "list"]),
    ("", {"field": b"\xff"}),
    ("", LEASE),
    ("", LEASE | {"owner": b"\xff"}),
    ("", LEASE | {"seed": "seed"}),
    ("", LEASE | {"seed": 2**64}),
    ("", LEASE | {"end": "END_OF_SEQUENCE"}),
    ("", LEASE | {"end": "FAILED 1 1"}),
    ("", LEASE | {"end": "END_OF_SEQUENCE 1 -1"}),
    ("", LEASE | {"end": f"END_OF_SEQUENCE {2**31} 1"}),
    (":seed", b"\xff"),
    (":seed", -1),
    (":seed", 2**64),
    (":seed", ["a", "list"]),
    (":text", "a string"),
    (":readers", "a string"),
]
MOMENT, MINUTE = 60, 60_000  # milliseconds


@pytest.fixture(autouse=True)
def short_leases(monkeypatch: pytest.MonkeyPatch, patient_stores: None) -> None:
    """Let a replica wait only a moment for an owner that does not exist."""
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.1)


async def write(client: Any, name: bytes, value: Any, milliseconds: int | None) -> None:
    """Replace a key by this value; a number of milliseconds is the time to its expiry."""
    await client.delete(name)
    if isinstance(value, dict):
        await client.hset(name, mapping=value)
    elif isinstance(value, list):
        await client.rpush(name, *value)
    else:
        await client.set(name, value)
    if milliseconds is not None:
        await client.pexpire(name, milliseconds)


@pytest.mark.parametrize("milliseconds", [None, MOMENT, MINUTE])
async def test_a_reply_does_not_depend_on_them(
    replica: Replicas, redis: RedisServer, milliseconds: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replica computes the reply itself, with the seed of the request if it has one."""
    monkeypatch.setattr(redis_client_module, "BACKOFF_SECONDS", 0)  # so that each value is read
    async with redis_client(redis) as client, replica("a", response_cache_max_entry_bytes=1) as a:
        for request in (STORY, pb.GenerateRequest(prompt="a story", seed=42)):
            await a.text.Generate(request)
            (name,) = await names_of(client, ":seed")
            for suffix, value in VALUES:
                await client.flushall()
                await write(client, name.removesuffix(b":seed") + suffix.encode(), value, milliseconds)
                reply = await a.text.Generate(request)
                assert reply.response == REPLY, (suffix, value)
                # A valid lease for a moment is a replica that was lost, and whose calls may have been billed.
                assert milliseconds == MOMENT or reply.completion.usage.neurons != "0", (suffix, value)
                assert not request.seed or reply.completion.seed == request.seed, (suffix, value)
            await client.flushall()
        assert prefills(a) == [2 + 2 * len(VALUES)]


async def test_a_reader_survives_a_foreign_value(
    replica: Replicas, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease of a reply in progress becomes unreadable: the reader's replica continues its text."""
    monkeypatch.setattr(leases, "LEASE_SECONDS", 2.0)
    async with redis_client(redis) as client, replica("a") as a, replica("b") as b:
        leader = await hold_slot(a, "a story")
        call, text = await follow(b)
        for lease in await names_of(client):
            await client.hset(lease, "end", b"\xff")
        rest, completion = await rest_of(call)
        assert (text + rest, completion.cached) == (REPLY, True)
        assert prefills(a, b) == [1, 1]
        a.model.open_gate()
        assert REPLY.endswith((await rest_of(leader))[0])
