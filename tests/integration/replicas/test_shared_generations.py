"""Coalescing across replicas: equal requests on two replicas make one generation, as in one process."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis.asyncio
from tests.integration.idempotency.conftest import keyed, read_stream
from tests.integration.replicas.conftest import REPLY, Replicas, follow, prefills, rest_of, results, stops
from tests.integration.service.conftest import records
from tests.support.accounts import AccountByHeader, as_account
from tests.support.servers.redis_server import RedisServer
from tests.support.service import Service, disconnect, hold_slot, until, with_config

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard, RequestsPerMinute

pytestmark = pytest.mark.usefixtures("patient_leases")

STORY = pb.GenerateRequest(prompt="a story")


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


async def test_eight_calls_on_two_replicas_are_one_generation(replica: Replicas, tmp_path: Path) -> None:
    """Texts, seeds, usage and records are equal to eight calls in one process."""
    async with replica("one", data_directory=tmp_path / "single" / "one") as one:
        texts, completions = await eight_calls([one], prompt="a story")
        assert texts == {REPLY}
        assert prefills(one) == [1]
        expected = facts(completions)
    async with replica("a") as a, replica("b") as b:
        # Another prompt, because the reply to the first one is in the response cache.
        texts, completions = await eight_calls([a, b], prompt="a storm")
        assert texts == {REPLY}
        assert prefills(a, b) == [1, 0]
        assert facts(completions) == expected
        assert results(a) == {"computed": 1}
        assert results(b) == {"joined": 1}
    assert billed(tmp_path) == billed(tmp_path / "single")
    assert [record[0] for record in billed(tmp_path)].count(False) == 1


async def eight_calls(services: list[Service], prompt: str) -> tuple[set[str], list[pb.Completion]]:
    """Return the texts and the completions of eight calls; each has read the first text before the second step."""
    calls = [await hold_slot(services[0], prompt)]
    texts = [""]
    for number in range(1, 8):
        call, text = await follow(services[number % len(services)], prompt=prompt)
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


async def test_remote_readers_count_as_readers(
    replica: Replicas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the call that started it, a generation continues for a reader on another replica.

    After the last reader has left, it stops within one step.
    """
    stopped = stops(monkeypatch)
    async with replica("a", ends=False) as a, replica("b", ends=False) as b:
        leader = await start_leader(a)
        call, text = await follow(b)
        await disconnect(a, leader)
        a.model.allow(2)
        while len(text) < len("Once upon"):
            text += (await call.read()).response
        await a.model.wait_until_blocked(3)
        assert not stopped.is_set()
        await disconnect(b, call)
        await stopped.wait()
        a.model.open_gate()
        await until(lambda: a.metrics.registry.get_sample_value("llama2_requests_running") == 0)
        assert prefills(a, b) == [1, 0]
    (of_a,), (of_b,) = list(records(tmp_path / "a")), list(records(tmp_path / "b"))
    assert (of_a["outcome"], of_a["output_tokens"]) == ("CANCELLED", 4)  # three tokens, and the step in progress
    assert (of_b["outcome"], of_b["neurons"]) == ("CANCELLED", 0)


async def test_redis_has_no_prompt_and_forgets_the_text(
    replica: Replicas, redis: RedisServer, caching_card: ModelCard
) -> None:
    """The names are digests, the prompt is in no value, and each key expires; the stream has the text."""
    prompt = "The password is swordfish"
    client = redis_client(redis)
    async with replica("a", response_cache_max_entry_bytes=1) as a, replica("b") as b:
        leader = await hold_slot(a, prompt)
        call, text = await follow(b, prompt=prompt)
        names = [name async for name in client.scan_iter("llama2:reply:*")]
        assert {name.decode().rpartition("}")[2] for name in names} == {"", ":text", ":readers", ":seed"}
        stored = b""
        for name in names:
            assert await client.pttl(name) > 0
            stored += name + (await client.dump(name))
        for word in (b"password", b"swordfish"):
            assert word not in stored
        assert text.strip().encode() in stored
        a.model.open_gate()
        await asyncio.gather(rest_of(leader), rest_of(call))
    await client.aclose()


def redis_client(server: RedisServer) -> Any:
    """Return a client of the test's Redis."""
    return redis.asyncio.Redis.from_url(server.url, protocol=2)
