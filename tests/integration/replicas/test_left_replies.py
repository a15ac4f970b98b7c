"""Replies that some or all of their readers leave, while replicas share them."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.integration.idempotency.conftest import keyed, start_stream, stored_keys
from tests.integration.replicas.conftest import (
    REPLY,
    STORY,
    Replicas,
    follow,
    names_of,
    prefills,
    redis_client,
    rest_of,
    stops,
    until_in_redis,
)
from tests.integration.service.conftest import records
from tests.support.servers.redis_server import RedisServer
from tests.support.service import Service, disconnect, hold_slot, until

from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.generation.replicas import shared_reply
from llama2_server.generation.replicas.shared_reply import SharedReply
from llama2_server.usage.keys.records import KeyState

pytestmark = pytest.mark.usefixtures("patient_leases")


@pytest.fixture
def three_tokens(demo_tokenizer: Tokenizer) -> str:
    """The text of the first three tokens of the reply."""
    return demo_tokenizer.decode(demo_tokenizer.encode_raw(REPLY)[1:4])


async def start_leader(service: Service) -> Any:
    """Return a call that generates: its first delta is read, and the gated model is in its next step."""
    return await hold_slot(service, "a story")


def remote_readers(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Return an event that is set when an owner knows of a reader on another replica."""
    known, set_readers = asyncio.Event(), SharedReply._set_remote_readers

    def set_and_tell(shared: SharedReply, reply: Any, readers: int) -> None:
        set_readers(shared, reply, readers)
        if readers:
            known.set()

    monkeypatch.setattr(SharedReply, "_set_remote_readers", set_and_tell)
    return known


async def leave_one_after_another(
    leader: tuple[Service, Any], reader: tuple[Service, Any], text: str, three_tokens: str, stopped: asyncio.Event
) -> None:
    """Let the call that started a generation leave, and later its reader on another replica: it stops only then."""
    owner, call = leader[0], reader[1]
    await disconnect(*leader)
    owner.model.allow(2)
    while len(text) < len(three_tokens):
        text += (await call.read()).response
    await owner.model.wait_until_blocked(3)
    assert not stopped.is_set()
    await disconnect(*reader)
    await stopped.wait()
    owner.model.open_gate()
    await until(lambda: owner.metrics.registry.get_sample_value("llama2_requests_running") == 0)
    assert prefills(owner, reader[0]) == [1, 0]


async def test_remote_readers_count_as_readers(
    replica: Replicas, three_tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the call that started it, a generation continues for a reader on another replica.

    After the last reader has left, it stops within one step.
    """
    stopped = stops(monkeypatch)
    async with replica("a", ends=False) as a, replica("b", ends=False) as b:
        leader = await start_leader(a)
        call, text = await follow(b)
        await leave_one_after_another((a, leader), (b, call), text, three_tokens, stopped)
    (of_a,), (of_b,) = list(records(tmp_path / "a")), list(records(tmp_path / "b"))
    assert (of_a["outcome"], of_a["output_tokens"]) == ("CANCELLED", 4)  # three tokens, and the step in progress
    assert (of_b["outcome"], of_b["neurons"]) == ("CANCELLED", 0)


async def published(client: Any) -> bytes:
    """Return the text of the only shared reply."""
    names = await names_of(client, ":text")
    return b"".join([fields[b"text"] for name in names for _, fields in await client.xrange(name)])


async def test_a_reader_that_leaves_changes_nothing_for_the_others(replica: Replicas, redis: RedisServer) -> None:
    """Neither for the owner, nor for a reader on its replica; Redis then counts one reader less."""
    async with redis_client(redis) as client, replica("a") as a, replica("b") as b, replica("c") as c:
        leader = await start_leader(a)
        stays, text = await follow(b)
        for service in (b, c):
            leaves, _ = await follow(service)
            await disconnect(service, leaves)
        (readers,) = await names_of(client, ":readers")
        await until_in_redis(lambda: client.zcard(readers), 1)
        a.model.open_gate()
        rest, completion = await rest_of(stays)
        assert (text + rest, completion.cached) == (REPLY, True)
        assert REPLY.endswith((await rest_of(leader))[0])
        assert prefills(a, b, c) == [1, 0, 0]


async def test_a_key_continues_for_a_reader_on_another_replica(
    replica: Replicas, three_tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call has left, and pays for what the reader gets; after that reader, the time to resume starts."""
    stopped, known = stops(monkeypatch), remote_readers(monkeypatch)
    async with replica("a", ends=False, resume_window_seconds=1e-3) as a, replica("b", ends=False) as b:
        leader, _ = await start_stream(a, keyed())
        call, text = await follow(b)
        await known.wait()
        await leave_one_after_another((a, leader), (b, call), text, three_tokens, stopped)
    (of_a,), (of_b,) = list(records(tmp_path / "a")), list(records(tmp_path / "b"))
    assert of_a["output_tokens"] >= 3
    assert of_a["neurons"] > 0
    assert of_b["neurons"] == 0
    (key,) = stored_keys(tmp_path / "a")
    assert key["state"] == KeyState.OPEN


async def test_a_call_that_leaves_pays_for_the_reader_that_came_before(
    replica: Replicas, redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the owner learns of the reader only afterwards."""
    monkeypatch.setattr(shared_reply, "RENEW_SECONDS", 120.0)  # it learns of readers when it publishes or renews
    known = remote_readers(monkeypatch)
    async with redis_client(redis) as client, replica("a") as a, replica("b") as b:
        leader, text = await start_stream(a, keyed())
        await until_in_redis(lambda: published(client), text.encode())
        call, text = await follow(b)
        assert not known.is_set()
        await disconnect(a, leader)
        a.model.open_gate()
        rest, completion = await rest_of(call)
        assert (text + rest, completion.cached) == (REPLY, True)
        assert prefills(a, b) == [1, 0]
    (of_a,), (of_b,) = list(records(tmp_path / "a")), list(records(tmp_path / "b"))
    assert of_a["output_tokens"] == completion.usage.output_tokens
    assert (of_a["neurons"] > 0, of_b["neurons"]) == (True, 0)


async def test_a_reply_that_its_caller_left_is_not_joined(
    replica: Replicas, redis: RedisServer, tmp_path: Path
) -> None:
    """A key's generation that waits for its caller to return: another call would get the rest without paying."""
    async with redis_client(redis) as client, replica("a", resume_window_seconds=120) as a, replica("b") as b:
        leader, _ = await start_stream(a, keyed())
        assert await names_of(client)
        await disconnect(a, leader)
        await until_in_redis(lambda: names_of(client), [])
        reply = await b.text.Generate(STORY)
        assert (reply.response, reply.completion.cached) == (REPLY, False)
        assert prefills(a, b) == [1, 1]
    (of_b,) = list(records(tmp_path / "b"))
    assert of_b["neurons"] > 0
