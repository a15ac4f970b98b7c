"""Coalescing across replicas when the replica that computes a reply, or Redis, is lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from tests.integration.replicas.conftest import (
    REPLY,
    STORY,
    Replicas,
    expire_leases,
    fail,
    follow,
    names_of,
    prefills,
    redis_client,
    rest_of,
    results,
    stops,
)
from tests.integration.service.conftest import records
from tests.support.processes import card_file, server
from tests.support.servers.redis_server import RedisServer
from tests.support.service import Service, details, disconnect, hold_slot

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.engine.sequence import FinishReason
from llama2_server.generation.replicas import leases


@pytest.mark.usefixtures("patient_leases")
async def test_followers_complete_the_reply_of_a_failed_replica(replica: Replicas, tmp_path: Path) -> None:
    """The text continues behind the sent text, computed with the same seed; of two followers, one computes it."""
    async with replica("a") as a, replica("b") as b, replica("c") as c:
        leader = await hold_slot(a, "a story", temperature=1.0)
        calls = [await follow(service, temperature=1.0) for service in (b, b, c)]
        a.model.failure = RuntimeError("broken")
        a.model.open_gate()
        assert (await fail(leader)).code() is grpc.StatusCode.INTERNAL
        rests = [await rest_of(call) for call, _ in calls]
        for (_, text), (rest, completion) in zip(calls, rests, strict=True):
            assert text + rest == REPLY
            assert (completion.cached, completion.usage.neurons) == (True, "0")
        assert len({completion.seed for _, completion in rests}) == 1
        assert sum(prefills(b, c)) == 1
    found = [record for name in ("a", "b", "c") for record in records(tmp_path / name)]
    assert [one["outcome"] for one in found if one["neurons"] > 0] == ["INTERNAL"]


async def test_followers_complete_the_reply_of_a_killed_replica(
    replica: Replicas, redis: RedisServer, tmp_path: Path, patient_leases: None
) -> None:
    """The replica gets SIGKILL in the middle of its reply, and its lease expires."""
    folder = tmp_path / "killed"
    folder.mkdir()
    flags = (
        "--redis-url",
        redis.url,
        "--coalesce-across-replicas",
        "--card",
        str(card_file(folder)),
        "--weights",
        "demo",
    )
    with server(folder, *flags, module="tests.support.programs.replica_process") as (process, address):
        async with grpc.aio.insecure_channel(address) as channel, replica("b") as b:
            leader = text_generation_pb2_grpc.TextGenerationServiceStub(channel).GenerateStream(STORY)
            assert isinstance(await leader.read(), pb.GenerateStreamResponse)
            call, text = await follow(b)
            assert prefills(b) == [0]
            process.kill()
            await expire_leases(redis)
            rest, completion = await rest_of(call)
        assert text + rest == REPLY
        assert (completion.cached, completion.usage.neurons) == (True, "0")
        assert results(b) == {"joined": 1, "recomputed": 1}
        assert prefills(b) == [1]


@pytest.mark.usefixtures("patient_leases")
@pytest.mark.parametrize("other", ["Once upon a dime, a fox 🦊 lived by the sea.", "Once"])
async def test_another_text_is_never_appended(replica: Replicas, other: str) -> None:
    """A replica with the same fingerprint computes another text: the call fails behind the text that it has."""
    async with replica("a") as a, replica("b", reply=other) as b:
        leader = await hold_slot(a, "a story")
        call, text = await follow(b)
        while not text.startswith("Once upon a t"):
            a.model.allow(1)
            text += (await call.read()).response
        a.model.failure = RuntimeError("broken")
        a.model.open_gate()
        await fail(leader)
        error = await fail(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "could not be continued" in (error.details() or "")
        assert REPLY.startswith(text)
        assert results(b) == {"joined": 1, "recomputed": 1, "failed": 1}


@pytest.mark.usefixtures("patient_leases")
@pytest.mark.parametrize(("of_owner", "of_follower"), [(None, None), ("some", "other"), ("some", None)])
async def test_another_fingerprint_does_not_continue_a_text(
    replica: Replicas, of_owner: str | None, of_follower: str | None
) -> None:
    """The weights of both replicas were being hashed when the calls arrived, and turn out to differ, or are unknown."""
    async with owner_and_follower(replica, of_owner, of_follower) as (b, call, text):
        error = await fail(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details(error)["ErrorInfo"].reason == "ENGINE_UNAVAILABLE"  # type: ignore[attr-defined]
        assert "another fingerprint" in (error.details() or "")
        assert REPLY.startswith(text)
        assert prefills(b) == [0]
        assert results(b) == {"joined": 1, "failed": 1}


@pytest.mark.usefixtures("patient_leases")
async def test_a_fingerprint_that_is_known_later_continues_a_text(replica: Replicas) -> None:
    """The weights of both replicas turn out to be equal."""
    async with owner_and_follower(replica, "some", "some") as (b, call, text):
        rest, _ = await rest_of(call)
        assert text + rest == REPLY
        assert prefills(b) == [1]


@pytest.mark.usefixtures("patient_leases")
async def test_a_text_is_not_read_from_an_owner_with_another_fingerprint(replica: Replicas, redis: RedisServer) -> None:
    """The weights of the follower are still being hashed when another replica gets the lease."""
    async with running_owner_and_follower(replica, "some", new_fingerprint()) as (a, leader, _, call, _):
        async with redis_client(redis) as client:
            [lease] = await names_of(client)
            await client.hset(lease, mapping={"owner": "another", "fingerprint": "other"})
        error = await fail(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "another fingerprint" in (error.details() or "")
        a.model.open_gate()
        await rest_of(leader)


def new_fingerprint() -> Fingerprint:
    """Return a fingerprint without that of the weights, which are still being hashed."""
    return Fingerprint({"kernels": "scripted"}, "start of the weights")


@asynccontextmanager
async def owner_and_follower(
    replica: Replicas, of_owner: str | None, of_follower: str | None
) -> AsyncIterator[tuple[Service, Any, str]]:
    """Yield a replica with a call that reads a reply of another one, and its text so far; the other one has failed.

    The weights of the follower are known during the reply.
    """
    fingerprint = new_fingerprint()
    async with running_owner_and_follower(replica, of_owner, fingerprint) as (a, leader, b, call, text):
        if of_follower is not None:
            fingerprint.set_weights(of_follower)
        a.model.failure = RuntimeError("broken")
        a.model.open_gate()
        await fail(leader)
        yield b, call, text


@asynccontextmanager
async def running_owner_and_follower(
    replica: Replicas, of_owner: str | None, of_follower: Fingerprint
) -> AsyncIterator[tuple[Service, Any, Service, Any, str]]:
    """Yield a replica and its call, and another one whose call reads the reply of the first one, with its text so far.

    The weights of the owner are known when it starts to generate, and the weights of the follower are not.
    """
    fingerprint = new_fingerprint()
    async with replica("a", fingerprint=fingerprint) as a, replica("b", fingerprint=of_follower) as b:
        other = await hold_slot(a, "another story")
        leader = a.text.GenerateStream(STORY)
        await a.wait_until_queued(1)
        if of_owner is not None:
            fingerprint.set_weights(of_owner)
        with pytest.MonkeyPatch.context() as patch:
            stopped = stops(patch)
            await disconnect(a, other)
            await stopped.wait()
        a.model.allow(2)  # the step in progress, and the first one of the leader
        assert isinstance(await leader.read(), pb.GenerateStreamResponse)
        call, text = await follow(b)
        yield a, leader, b, call, text


@pytest.mark.usefixtures("patient_leases")
async def test_an_owner_without_its_lease_is_billed_alone(
    replica: Replicas, redis: RedisServer, tmp_path: Path
) -> None:
    """After a pause, two replicas compute the reply; both calls get it, and only the first one pays."""
    async with replica("a") as a, replica("b") as b:
        leader = await hold_slot(a, "a story")
        call, text = await follow(b)
        await expire_leases(redis)  # as when the owner is paused for two seconds
        rest, completion = await rest_of(call)
        assert text + rest == REPLY
        assert (completion.cached, completion.usage.neurons) == (True, "0")
        assert prefills(a, b) == [1, 1]
        a.model.open_gate()
        _, of_leader = await rest_of(leader)
        assert not of_leader.cached
        assert of_leader.seed == completion.seed
    prices = [record["neurons"] > 0 for name in ("a", "b") for record in records(tmp_path / name)]
    assert prices == [True, False]


async def test_without_redis_each_replica_computes(
    replica: Replicas, redis: RedisServer, caplog: pytest.LogCaptureFixture, patient_stores: None
) -> None:
    """Redis was lost before the calls: a line in the log, a metric, and the replies of separate replicas."""
    async with replica("a", quota_fallback="local") as a, replica("b", quota_fallback="local") as b:
        redis.kill()
        for service in (a, b, a):
            assert (await service.text.Generate(STORY)).response == REPLY
        assert prefills(a, b) == [2, 1]
        assert (results(a), results(b)) == ({"unshared": 2}, {"unshared": 1})
        redis.start()
        assert "the store of shared generations at" in caplog.text
        assert "does not answer" in caplog.text


async def test_redis_is_lost_before_a_lease_is_claimed(
    replica: Replicas, redis: RedisServer, patient_stores: None
) -> None:
    """A call that waits for its slot at that moment computes its reply alone."""
    async with replica("a", quota_fallback="local") as a:
        other = await hold_slot(a, "another story")
        waiting = asyncio.ensure_future(a.text.Generate(STORY))
        await a.wait_until_queued(1)
        redis.kill()
        a.model.open_gate()
        assert (await waiting).response == REPLY
        assert results(a)["unshared"] == 1
        await rest_of(other)
        redis.start()


async def test_redis_is_lost_during_a_reply(
    replica: Replicas, redis: RedisServer, tmp_path: Path, patient_stores: None
) -> None:
    """The follower computes the rest with the same seed, and the first replica completes its own reply."""
    async with replica("a", quota_fallback="local") as a, replica("b", quota_fallback="local") as b:
        leader = await hold_slot(a, "a story", temperature=1.0)
        call, text = await follow(b, temperature=1.0)
        redis.kill()
        rest, completion = await rest_of(call)
        assert text + rest == REPLY
        assert prefills(a, b) == [1, 1]
        a.model.open_gate()
        _, of_leader = await rest_of(leader)
        assert completion.seed == of_leader.seed
        assert (of_leader.cached, completion.cached) == (False, True)
        redis.start()
    prices = [record["neurons"] > 0 for name in ("a", "b") for record in records(tmp_path / name)]
    assert prices == [True, False]


async def test_a_repeated_command_adds_its_text_once(redis: RedisServer, patient_leases: None) -> None:
    """A command that arrived, but whose answer was lost, can be sent again with more text, or with the end."""
    store, end = leases.ReplyLeases(redis.url, seed_seconds=60), leases.ReplyEnd(FinishReason.MAX_TOKENS, 3, 2)
    assert await store.claim("digest", "owner", 7, "fingerprint")
    assert not await store.claim("digest", "other", 7, "fingerprint")
    assert await store.publish("digest", "owner", 0, "Once ", None) == (5, 0)
    assert await store.publish("digest", "owner", 0, "Once upon", None) == (5, 0)
    assert await store.publish("digest", "owner", 0, "Once", end) == (5, 0)
    part = await store.read("digest", "reader", "", "0")
    assert part is not None
    assert (part.text, part.end, part.seed, part.fingerprint) == ("Once ", None, 7, "fingerprint")
    assert await store.publish("digest", "owner", 5, "upon", end) == (9, 1)
    last = await store.read("digest", "reader", part.owner, part.position)
    assert last is not None
    assert (last.text, last.end) == ("upon", end)
    assert (await store.publish("digest", "other", 9, "mixed", None))[0] == -1
    await store.close()
