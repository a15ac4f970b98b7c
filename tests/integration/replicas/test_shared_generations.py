"""Coalescing across replicas: equal requests on two replicas make one generation, as in one process."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.integration.idempotency.conftest import keyed, read_stream
from tests.integration.replicas.conftest import (
    REPLY,
    STORY,
    Replicas,
    expire_leases,
    follow,
    names_of,
    prefills,
    redis_client,
    rest_of,
    results,
)
from tests.integration.service.conftest import records
from tests.support.accounts import AccountByHeader, as_account
from tests.support.servers.redis_server import RedisServer
from tests.support.service import Service, hold_slot, until, with_config

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard, RequestsPerMinute
from llama2_server.generation.replicas import leases

pytestmark = pytest.mark.usefixtures("patient_leases")

PRODUCTION_LEASE_SECONDS = leases.LEASE_SECONDS
SUFFIXES = ("", ":text", ":readers", ":seed")


def facts(completions: list[pb.Completion]) -> list[Any]:
    """Return the facts of equal calls that do not depend on their times; a generation is billed once."""
    usages = sorted((one.cached, one.usage.SerializeToString()) for one in completions)
    assert len({one.seed for one in completions}) == 1
    assert len({one.fingerprint for one in completions}) == 1
    assert {one.finish_reason for one in completions} == {pb.FINISH_REASON_END_OF_SEQUENCE}
    return usages


def billed(folder: Path) -> list[Any]:
    """Return the usage records of all replicas, without names and times."""
    found = [record for name in ("a", "b", "one") if (folder / name).exists() for record in records(folder / name)]
    return sorted((one["served_from_cache"], one["neurons"], one["output_tokens"], one["outcome"]) for one in found)


async def start_leader(service: Service) -> Any:
    """Return a call that generates: its first delta is read, and the gated model is in its next step."""
    return await hold_slot(service, "a story")


async def test_eight_calls_on_two_replicas_are_one_generation(
    replica: Replicas, redis: RedisServer, tmp_path: Path
) -> None:
    """Texts, seeds, usage and records are equal to eight calls in one process."""
    async with replica("one", data_directory=tmp_path / "single" / "one") as one:
        texts, completions = await eight_calls([one])
        assert texts == {REPLY}
        assert prefills(one) == [1]
        expected = facts(completions)
    async with redis_client(redis) as client:
        await client.flushall()  # the response cache has the reply
    async with replica("a") as a, replica("b") as b:
        texts, completions = await eight_calls([a, b])
        assert texts == {REPLY}
        assert prefills(a, b) == [1, 0]
        assert facts(completions) == expected
        assert results(a) == {"computed": 1}
        assert results(b) == {"joined": 1}
    assert billed(tmp_path) == billed(tmp_path / "single")
    assert [record[0] for record in billed(tmp_path)].count(False) == 1


async def eight_calls(services: list[Service]) -> tuple[set[str], list[pb.Completion]]:
    """Return the texts and the completions of eight calls; each has read the first text before the second step."""
    calls = [await hold_slot(services[0], "a story")]
    texts = [""]
    for number in range(1, 8):
        call, text = await follow(services[number % len(services)])
        calls.append(call)
        texts.append(text)
    services[0].model.open_gate()
    rests = [await rest_of(call) for call in calls]
    # `hold_slot` has read the first text of the leader.
    whole = {text + rest for text, (rest, _) in zip(texts[1:], rests[1:], strict=True)}
    assert REPLY.endswith(rests[0][0])
    return whole, [completion for _, completion in rests]


async def test_racing_calls_are_one_generation(replica: Replicas) -> None:
    """Without a request for a seed, the replicas agree on one before they wait for their slots."""
    async with replica("a") as a, replica("b") as b:
        for prompt in ("one", "two", "three", "four"):
            calls = [service.text.Generate(pb.GenerateRequest(prompt=prompt)) for service in 4 * [a, b]]
            replies = await asyncio.gather(*calls)
            assert {reply.response for reply in replies} == {REPLY}
            assert len({reply.completion.seed for reply in replies}) == 1
        assert sum(prefills(a, b)) == 4


async def test_a_follower_needs_no_slot(replica: Replicas) -> None:
    """It reads from the first character on, although another call holds the only slot of its replica."""
    async with replica("a") as a, replica("b", max_queue_size=0) as b:
        leader = await start_leader(a)
        other = await hold_slot(b, "another story")
        call, text = await follow(b)
        a.model.open_gate()
        rest, completion = await rest_of(call)
        assert text + rest == REPLY
        assert completion.cached
        assert completion.usage.neurons == "0"
        assert not (await rest_of(leader))[1].cached
        assert prefills(a, b) == [1, 1]
        b.model.open_gate()
        await rest_of(other)


async def test_a_queued_call_finds_the_stored_reply(replica: Replicas) -> None:
    """A reply that was computed elsewhere during the wait for a slot is not computed again."""
    async with replica("a") as a, replica("b") as b:
        other = await hold_slot(b, "another story")
        waiting = asyncio.ensure_future(b.text.Generate(STORY))
        await b.wait_until_queued(1)
        first = await a.text.Generate(STORY)
        b.model.open_gate()
        reply = await waiting
        assert (reply.response, reply.completion.cached) == (REPLY, True)
        assert reply.completion.seed == first.completion.seed
        assert prefills(a, b) == [1, 1]
        await rest_of(other)


@pytest.mark.parametrize("same_seed", [True, False], ids=["same seed", "another seed"])
async def test_a_queued_call_finds_a_stored_reply_without_a_lease(
    replica: Replicas, redis: RedisServer, same_seed: bool
) -> None:
    """The lease of a stored reply has expired: a waiting call takes the reply only if it is that of its own seed."""
    async with replica("a") as a, replica("b") as b:
        other = await hold_slot(b, "another story")
        waiting = asyncio.ensure_future(b.text.Generate(STORY))
        await b.wait_until_queued(1)
        if not same_seed:
            await expire_leases(redis)
        first = await a.text.Generate(STORY)
        await expire_leases(redis)
        b.model.open_gate()
        reply = await waiting
        assert (reply.response, reply.completion.cached) == (REPLY, same_seed)
        assert (reply.completion.seed == first.completion.seed) is same_seed
        assert prefills(a, b) == [1, 1 if same_seed else 2]
        await rest_of(other)


async def test_accounts_never_share(replica: Replicas) -> None:
    """An equal request of another account on another replica is generated again."""
    async with replica("a", accounts=AccountByHeader()) as a, replica("b", accounts=AccountByHeader()) as b:
        await hold_slot(a, "a story", metadata=as_account("a"))
        reply = await b.text.Generate(STORY, metadata=as_account("b"))
        assert not reply.completion.cached
        assert prefills(a, b) == [1, 1]
        a.model.open_gate()


async def test_keyed_calls_share_a_generation_and_its_seed(replica: Replicas) -> None:
    """Each key binds the seed of the shared text, so that its stream can be resumed; the follower costs nothing."""
    async with replica("a") as a, replica("b") as b:
        a.model.gate()
        a.model.allow(1)
        leader = asyncio.ensure_future(a.text.Generate(keyed("first")))
        await a.wait_until_in_step()
        follower = asyncio.ensure_future(read_stream(b, keyed("second")))
        await until(lambda: results(b) == {"joined": 1})
        a.model.open_gate()
        first, (text, completion) = await leader, await follower
        assert first.response == text == REPLY
        assert completion.seed == first.completion.seed
        assert (first.completion.cached, completion.cached) == (False, True)
        assert completion.usage.neurons == "0"
        again, resumed = await read_stream(b, keyed("second", resume_after_characters=10))
        assert (again, resumed.seed) == (REPLY[10:], completion.seed)
        assert prefills(a, b) == [1, 0]


async def test_a_joined_call_costs_one_request_of_the_quota(replica: Replicas, caching_card: ModelCard) -> None:
    """As in one process."""
    card = with_config(caching_card, max_requests_per_min=RequestsPerMinute(default=2, accounts={}))
    async with replica("a", card=card) as a, replica("b", card=card) as b:
        leader = await start_leader(a)
        call, _ = await follow(b)
        for service in (a, b):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await service.text.Generate(STORY)
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        a.model.open_gate()
        await asyncio.gather(rest_of(leader), rest_of(call))


async def test_redis_has_no_prompt_and_forgets_the_text(
    replica: Replicas, redis: RedisServer, caching_card: ModelCard
) -> None:
    """The names are digests; prompt, account and API key are in no value; each key expires; the stream has the text."""
    prompt = "The password is swordfish"
    async with (
        redis_client(redis) as client,
        replica("a", response_cache_max_entry_bytes=1, accounts=AccountByHeader()) as a,
        replica("b", accounts=AccountByHeader()) as b,
    ):
        metadata = as_account("account-of-the-test")
        leader = await hold_slot(a, prompt, metadata=metadata)
        call: Any = b.text.GenerateStream(pb.GenerateRequest(prompt=prompt), metadata=metadata)
        text = (await call.read()).response
        stored = {name: await client.dump(name) for suffix in SUFFIXES for name in await names_of(client, suffix)}
        assert len(stored) == len(SUFFIXES) == len(await client.keys("llama2:reply:*"))
        for name in stored:
            assert await client.pttl(name) > 0
        for word in (b"password", b"swordfish", b"account-of-the-test"):
            assert word not in b"".join([*stored, *stored.values()])
        assert [name.endswith(b":text") for name, value in stored.items() if text.strip().encode() in value] == [True]
        a.model.open_gate()
        await asyncio.gather(rest_of(leader), rest_of(call))


async def test_a_lease_lives_for_two_seconds(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the times of production: lease, text and readers expire two seconds after the last renewal."""
    monkeypatch.setattr(leases, "LEASE_SECONDS", PRODUCTION_LEASE_SECONDS)
    store = leases.ReplyLeases(redis.url, seed_seconds=60)
    async with redis_client(redis) as client:
        assert await store.claim("digest", "owner", 7, "fingerprint")
        await store.publish("digest", "owner", 0, "Once", None)
        await store.read("digest", "reader", "", "0")
        for name in await client.keys("llama2:reply:*"):
            assert 0 < await client.pttl(name) <= 2000
    await store.close()
