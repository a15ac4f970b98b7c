"""Response cache and coalescing over a real socket, on a scripted model."""

import asyncio
from pathlib import Path

import grpc.aio
import pytest
from tests.integration.service.conftest import records
from tests.support.accounts import AccountByHeader, as_account
from tests.support.scripted_model import scripted_fingerprint
from tests.support.servers.redis_server import running_redis
from tests.support.service import Service, ServiceMaker, UnaryStream, disconnect, hold_slot, remaining_text

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard

REPLY = "Once upon a time, a fox 🦊 lived by the sea."


async def test_equal_request_is_a_cache_hit(
    serve_scripted: ServiceMaker, caching_card: ModelCard, tmp_path: Path
) -> None:
    """A hit has the same text and seed in both RPCs, is marked as cached, costs no neurons, and needs no slot."""
    async with serve_scripted(REPLY, card=caching_card) as service:
        request = pb.GenerateRequest(prompt="a story")
        first = await service.text.Generate(request)
        await hold_slot(service)
        again = await service.text.Generate(request)
        parts = [part async for part in service.text.GenerateStream(request)]
        assert first.response == again.response == "".join(part.response for part in parts) == REPLY
        assert [reply.completion.cached for reply in (first, again, parts[-1])] == [False, True, True]
        for completion in (again.completion, parts[-1].completion):
            assert completion.seed == first.completion.seed
            assert completion.finish_reason == first.completion.finish_reason
            assert completion.usage.neurons == "0"
            assert completion.usage.output_tokens == first.completion.usage.output_tokens
        assert service.model.prefills == 2
    hits = [record for record in records(tmp_path) if record["served_from_cache"]]
    assert [record["neurons"] for record in hits] == [0, 0]
    assert {record["outcome"] for record in hits} == {"END_OF_SEQUENCE"}


@pytest.mark.parametrize(
    "other",
    [
        pb.GenerateRequest(prompt="a story", temperature=0.1),
        pb.GenerateRequest(prompt="a story", max_tokens=100),
        pb.GenerateRequest(prompt="a story", seed=5),
        pb.GenerateRequest(prompt="a story", stop=["x"]),
        pb.GenerateRequest(prompt="a story", raw=True),
        pb.GenerateRequest(prompt="another story"),
        pb.GenerateRequest(prompt="a story", no_cache=True),
    ],
)
async def test_different_request_is_a_cache_miss(
    serve_scripted: ServiceMaker, caching_card: ModelCard, other: pb.GenerateRequest
) -> None:
    """A request that differs in any field that affects the reply is a miss; `no_cache` does not read the cache."""
    async with serve_scripted(REPLY, card=caching_card) as service:
        await service.text.Generate(pb.GenerateRequest(prompt="a story"))
        assert not (await service.text.Generate(other)).completion.cached
        assert service.model.prefills == 2


async def test_shared_cache_separates_weights(
    serve_scripted: ServiceMaker, caching_card: ModelCard, tmp_path: Path, patient_stores: None
) -> None:
    """Redis outlives a server: after a change of weights under the same card, replies of the old ones are misses."""
    request, cached = pb.GenerateRequest(prompt="a story"), []
    with running_redis(tmp_path) as redis:
        for weights in ("old", "old", "new"):
            fingerprint = scripted_fingerprint(weights)
            async with serve_scripted(
                REPLY, card=caching_card, fingerprint=fingerprint, redis_url=redis.url
            ) as service:
                cached.append((await service.text.Generate(request)).completion.cached)
    assert cached == [False, True, False]


async def test_no_cache_writes_nothing(serve_scripted: ServiceMaker, caching_card: ModelCard) -> None:
    """A reply to a `no_cache` request is not stored for other requests."""
    async with serve_scripted(REPLY, card=caching_card) as service:
        await service.text.Generate(pb.GenerateRequest(prompt="a story", no_cache=True))
        assert not (await service.text.Generate(pb.GenerateRequest(prompt="a story"))).completion.cached


async def test_accounts_never_share(serve_scripted: ServiceMaker, caching_card: ModelCard) -> None:
    """An equal request of another account is generated again."""
    async with serve_scripted(REPLY, card=caching_card, accounts=AccountByHeader()) as service:
        request = pb.GenerateRequest(prompt="a story")
        await service.text.Generate(request, metadata=as_account("a"))
        reply = await service.text.Generate(request, metadata=as_account("b"))
        assert not reply.completion.cached
        assert service.model.prefills == 2


async def test_card_without_cache_stores_nothing(serve_scripted: ServiceMaker) -> None:
    """Without a response cache in the card, equal requests are generated again."""
    async with serve_scripted(REPLY) as service:
        for _ in range(2):
            assert not (await service.text.Generate(pb.GenerateRequest(prompt="a story"))).completion.cached
        assert service.model.prefills == 2


async def test_incomplete_reply_is_not_stored(serve_scripted: ServiceMaker, caching_card: ModelCard) -> None:
    """After a cancelled and a failed reply, the same request is generated again."""
    async with serve_scripted(REPLY, card=caching_card) as service:
        await disconnect(service, await hold_slot(service))
        service.model.open_gate()
        service.model.failure = RuntimeError("broken")
        with pytest.raises(grpc.aio.AioRpcError):
            await service.text.Generate(pb.GenerateRequest(prompt="hold"))
        service.model.failure = None
        reply = await service.text.Generate(pb.GenerateRequest(prompt="hold"))
        assert not reply.completion.cached
        assert reply.response == REPLY


async def start_shared_generation(service: Service, prompt: str) -> tuple[UnaryStream, UnaryStream]:
    """Return two calls of the same request: the leader, which started it, and a follower; both have read one delta."""
    leader = await hold_slot(service, prompt)
    follower = service.text.GenerateStream(pb.GenerateRequest(prompt=prompt))
    first = await follower.read()
    assert isinstance(first, pb.GenerateStreamResponse)
    assert REPLY.startswith(first.response)
    return leader, follower


async def test_concurrent_equal_requests_share_one_generation(
    serve_scripted: ServiceMaker, caching_card: ModelCard, tmp_path: Path
) -> None:
    """A follower receives the reply from its first token; one generation serves both calls, and only one is billed."""
    async with serve_scripted(REPLY, card=caching_card) as service:
        leader, follower = await start_shared_generation(service, "a story")
        service.model.open_gate()
        rests = await asyncio.gather(remaining_text(leader), remaining_text(follower))
        assert all(REPLY.endswith(rest) for rest in rests)
        assert service.model.prefills == 1
    neurons_by_cached = {record["served_from_cache"]: record["neurons"] for record in records(tmp_path)}
    assert neurons_by_cached[False] > 0
    assert neurons_by_cached[True] == 0


async def test_generation_continues_for_followers(serve_scripted: ServiceMaker, caching_card: ModelCard) -> None:
    """If the leader disconnects, the followers still receive the whole reply."""
    async with serve_scripted(REPLY, card=caching_card) as service:
        leader, follower = await start_shared_generation(service, "a story")
        await disconnect(service, leader)
        service.model.open_gate()
        assert REPLY.endswith(await remaining_text(follower))
        assert service.model.prefills == 1


async def test_generation_without_readers_stops(
    serve_scripted: ServiceMaker, caching_card: ModelCard, tmp_path: Path
) -> None:
    """If all clients disconnect, the model stops, and the computed tokens are recorded once."""
    async with serve_scripted(REPLY, ends=False, card=caching_card) as service:
        leader, follower = await start_shared_generation(service, "a story")
        await disconnect(service, leader, follower)
        service.model.open_gate()
        other = await service.text.Generate(pb.GenerateRequest(prompt="other", max_tokens=2))
        assert other.completion.usage.output_tokens == 2
    by_outcome = {record["outcome"]: record for record in records(tmp_path) if not record["served_from_cache"]}
    assert set(by_outcome) == {"CANCELLED", "MAX_TOKENS"}
    assert by_outcome["CANCELLED"]["output_tokens"] == 2  # the token that was read, and the step in progress
