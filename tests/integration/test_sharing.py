"""Response cache, single flight, quota and ledger as callers see them: over a real socket, on a scripted model."""

import asyncio
import sqlite3
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from tests.support.redis_server import running_redis
from tests.support.service import (
    Service,
    ServiceMaker,
    details,
    disconnect,
    hold_slot,
    remaining_text,
    server_deadline,
    until,
    with_config,
)

from llama2.v1 import account_pb2, account_pb2_grpc, model_pb2
from llama2.v1 import text_generation_pb2 as pb
from llama2_server.admission.accounts import Account, AnonymousAuthenticator, Metadata
from llama2_server.card import ModelCard, RequestsPerMinute
from llama2_server.usage.pricing import TokenUsage, neurons

REPLY = "Once upon a time, a fox 🦊 lived by the sea."


class AccountsByHeader(AnonymousAuthenticator):
    """Every caller is who it says; tests of sharing need several accounts, not their keys."""

    def authenticate(self, metadata: Metadata) -> Account:
        return Account(str(dict(metadata).get("account", "a")))


def as_account(name: str) -> tuple[tuple[str, str], ...]:
    return (("account", name),)


@pytest.fixture
def sharing_card(demo_card: ModelCard) -> ModelCard:
    """The demo card, with its response cache and as good as no quota."""
    assert demo_card.constellation_config.infer_response_cache == "in_memory"
    return with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=10**6))


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """The ledger's records, as they lie in its file."""
    connection = sqlite3.connect(folder / "usage.db")
    connection.row_factory = sqlite3.Row
    for row in connection.execute("SELECT * FROM usage_records"):
        yield dict(row) | {"neurons": Decimal(row["nanoneurons"]).scaleb(-9)}
    connection.close()


async def test_equal_request_is_served_from_the_cache(
    serve_scripted: ServiceMaker, sharing_card: ModelCard, tmp_path: Path
) -> None:
    """A hit has the same text and seed in both RPCs, is marked, costs nothing, and needs no slot."""
    async with serve_scripted(REPLY, card=sharing_card) as service:
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
async def test_other_request_is_generated(
    serve_scripted: ServiceMaker, sharing_card: ModelCard, other: pb.GenerateRequest
) -> None:
    """Whatever can change the answer makes another request; `no_cache` reads nothing."""
    async with serve_scripted(REPLY, card=sharing_card) as service:
        await service.text.Generate(pb.GenerateRequest(prompt="a story"))
        assert not (await service.text.Generate(other)).completion.cached
        assert service.model.prefills == 2


async def test_a_shared_cache_keeps_the_weights_apart(
    serve_scripted: ServiceMaker, sharing_card: ModelCard, tmp_path: Path
) -> None:
    """Redis outlives a server: after a change of weights under the same card no reply of the old ones comes back."""
    request, cached = pb.GenerateRequest(prompt="a story"), []
    with running_redis(tmp_path) as redis:
        for weights in ("old", "old", "new"):
            async with serve_scripted(REPLY, card=sharing_card, fingerprint=weights, redis_url=redis.url) as service:
                cached.append((await service.text.Generate(request)).completion.cached)
    assert cached == [False, True, False]


async def test_no_cache_writes_nothing(serve_scripted: ServiceMaker, sharing_card: ModelCard) -> None:
    """A reply to a `no_cache` request is not kept for others."""
    async with serve_scripted(REPLY, card=sharing_card) as service:
        await service.text.Generate(pb.GenerateRequest(prompt="a story", no_cache=True))
        assert not (await service.text.Generate(pb.GenerateRequest(prompt="a story"))).completion.cached


async def test_accounts_never_share(serve_scripted: ServiceMaker, sharing_card: ModelCard) -> None:
    """Another account's equal request is generated, from the cache and in flight."""
    async with serve_scripted(REPLY, card=sharing_card, accounts=AccountsByHeader()) as service:
        request = pb.GenerateRequest(prompt="a story")
        await service.text.Generate(request, metadata=as_account("a"))
        reply = await service.text.Generate(request, metadata=as_account("b"))
        assert not reply.completion.cached
        assert service.model.prefills == 2


async def test_card_without_cache_shares_nothing(serve_scripted: ServiceMaker) -> None:
    """Where the card does not ask for a response cache, equal requests are generated anew."""
    async with serve_scripted(REPLY) as service:
        for _ in range(2):
            assert not (await service.text.Generate(pb.GenerateRequest(prompt="a story"))).completion.cached
        assert service.model.prefills == 2


async def test_incomplete_reply_is_not_kept(serve_scripted: ServiceMaker, sharing_card: ModelCard) -> None:
    """What was cancelled or failed is generated anew."""
    async with serve_scripted(REPLY, card=sharing_card) as service:
        await disconnect(service, await hold_slot(service))
        service.model.open_gate()
        service.model.failure = RuntimeError("broken")
        with pytest.raises(grpc.aio.AioRpcError):
            await service.text.Generate(pb.GenerateRequest(prompt="hold"))
        service.model.failure = None
        reply = await service.text.Generate(pb.GenerateRequest(prompt="hold"))
        assert not reply.completion.cached
        assert reply.response == REPLY


async def followed(service: Service, prompt: str) -> tuple[Any, Any]:
    """Two calls of one request: the one that began it, and one that shares it, each with its first delta read."""
    leader = await hold_slot(service, prompt)
    follower = service.text.GenerateStream(pb.GenerateRequest(prompt=prompt))
    first = await follower.read()
    assert isinstance(first, pb.GenerateStreamResponse)
    assert REPLY.startswith(first.response)
    return leader, follower


async def test_identical_requests_in_flight_share_one_generation(
    serve_scripted: ServiceMaker, sharing_card: ModelCard, tmp_path: Path
) -> None:
    """A follower streams from the first token on; one generation serves both, and only one pays."""
    async with serve_scripted(REPLY, card=sharing_card) as service:
        leader, follower = await followed(service, "a story")
        service.model.open_gate()
        rests = await asyncio.gather(remaining_text(leader), remaining_text(follower))
        assert all(REPLY.endswith(rest) for rest in rests)
        assert service.model.prefills == 1
    paid = {record["served_from_cache"]: record["neurons"] for record in records(tmp_path)}
    assert paid[False] > 0
    assert paid[True] == 0


async def test_generation_goes_on_for_followers(serve_scripted: ServiceMaker, sharing_card: ModelCard) -> None:
    """When the caller who began it hangs up, the followers get the whole reply all the same."""
    async with serve_scripted(REPLY, card=sharing_card) as service:
        leader, follower = await followed(service, "a story")
        await disconnect(service, leader)
        service.model.open_gate()
        assert REPLY.endswith(await remaining_text(follower))
        assert service.model.prefills == 1


async def test_generation_without_readers_is_stopped(
    serve_scripted: ServiceMaker, sharing_card: ModelCard, tmp_path: Path
) -> None:
    """When all have hung up the model stops, and what was computed is in the ledger once."""
    async with serve_scripted(REPLY, ends=False, card=sharing_card) as service:
        leader, follower = await followed(service, "a story")
        await disconnect(service, leader, follower)
        service.model.open_gate()
        other = await service.text.Generate(pb.GenerateRequest(prompt="other", max_tokens=2))
        assert other.completion.usage.output_tokens == 2
    ended = {record["outcome"]: record for record in records(tmp_path) if not record["served_from_cache"]}
    assert set(ended) == {"CANCELLED", "MAX_TOKENS"}
    assert ended["CANCELLED"]["output_tokens"] == 2  # the one that was read and that of the step under way


async def test_quota_is_exact_on_the_wire(serve_scripted: ServiceMaker, demo_card: ModelCard) -> None:
    """Request N+1 is refused with QuotaFailure and RetryInfo; invalid requests and other methods cost nothing."""
    card = with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=1, accounts={"b": 3}))
    async with serve_scripted(REPLY, card=card, accounts=AccountsByHeader()) as service:
        usage = account_pb2_grpc.AccountServiceStub(service.channel)
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError) as invalid:
                await service.text.Generate(pb.GenerateRequest(), metadata=as_account("b"))
            assert invalid.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            await service.text.CountTokens(pb.CountTokensRequest(prompt="x"), metadata=as_account("b"))
            await service.models.GetModelCard(model_pb2.GetModelCardRequest())
            state = await usage.GetUsage(account_pb2.GetUsageRequest(), metadata=as_account("b"))
            assert (state.quota.max_requests_per_min, state.quota.requests_left) == (3, 3)
        for _ in range(3):
            await service.text.Generate(pb.GenerateRequest(prompt="x"), metadata=as_account("b"))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.text.Generate(pb.GenerateRequest(prompt="x"), metadata=as_account("b"))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        found = details(refused.value)
        failure, retry = found["QuotaFailure"], found["RetryInfo"]
        assert isinstance(failure, error_details_pb2.QuotaFailure)
        assert isinstance(retry, error_details_pb2.RetryInfo)
        assert failure.violations[0].subject == "account:b"
        assert 0 < retry.retry_delay.ToMilliseconds() <= 60_000
        await service.text.Generate(pb.GenerateRequest(prompt="x"), metadata=as_account("a"))


async def test_usage_tells_the_callers_own_totals(serve_scripted: ServiceMaker, sharing_card: ModelCard) -> None:
    """GetUsage counts every admitted request of the caller, exactly, and nobody else's."""
    async with serve_scripted(REPLY, card=sharing_card, accounts=AccountsByHeader()) as service:
        replies = [
            await service.text.Generate(pb.GenerateRequest(prompt=prompt), metadata=as_account("a"))
            for prompt in ("one", "two", "two")
        ]
        await service.text.Generate(pb.GenerateRequest(prompt="one"), metadata=as_account("b"))
        usage = await account_pb2_grpc.AccountServiceStub(service.channel).GetUsage(
            account_pb2.GetUsageRequest(), metadata=as_account("a")
        )
        (day,) = usage.days
        computed = [reply.completion for reply in replies if not reply.completion.cached]
        assert (usage.account, day.model, day.requests) == ("a", sharing_card.name, 3)
        assert day.input_tokens == sum(completion.usage.input_tokens for completion in computed)
        assert day.output_tokens == sum(completion.usage.output_tokens for completion in computed)
        assert Decimal(day.neurons) == sum(Decimal(reply.completion.usage.neurons) for reply in replies)
        counts = TokenUsage(day.input_tokens, day.output_tokens)
        assert Decimal(day.neurons) == neurons(counts, sharing_card.neuron_costs)
        assert day.cached_tokens > 0


@pytest.mark.parametrize(("since", "until"), [("yesterday", None), (None, "2026-13-01"), ("2026-02-02", "2026-02-01")])
async def test_usage_refuses_what_are_no_days(
    serve_scripted: ServiceMaker, since: str | None, until: str | None
) -> None:
    """A date that is none, and a range the wrong way round, are violations with their field."""
    async with serve_scripted() as service:
        request = account_pb2.GetUsageRequest(since=since or "", until=until or "")
        if since is None:
            request.ClearField("since")
        if until is None:
            request.ClearField("until")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await account_pb2_grpc.AccountServiceStub(service.channel).GetUsage(request)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "BadRequest" in details(refused.value)


async def test_every_admitted_request_has_one_record(
    serve_scripted: ServiceMaker, sharing_card: ModelCard, tmp_path: Path
) -> None:
    """Finished, cancelled in line, cancelled while generating, expired, failed, full line: one record each."""
    async with serve_scripted(REPLY, card=sharing_card, max_queue_size=1) as service:
        await service.text.Generate(pb.GenerateRequest(prompt="finished"))
        holder = await hold_slot(service)
        with pytest.raises(grpc.aio.AioRpcError):
            await service.text.Generate(pb.GenerateRequest(prompt="expired"), metadata=server_deadline(300))
        await until(lambda: len(list(records(tmp_path))) == 2)  # the server's own timer comes later than the caller's
        waiting = service.text.GenerateStream(pb.GenerateRequest(prompt="waiting"))
        reading = asyncio.create_task(waiting.read())
        await service.wait_until_queued(1)
        with pytest.raises(grpc.aio.AioRpcError):
            await service.text.Generate(pb.GenerateRequest(prompt="one too many"))
        await disconnect(service, waiting, holder)
        await asyncio.wait([reading])
        service.model.open_gate()
        await until(lambda: len(list(records(tmp_path))) == 5)
        service.model.failure = RuntimeError("broken")
        with pytest.raises(grpc.aio.AioRpcError):
            await service.text.Generate(pb.GenerateRequest(prompt="failed"))
    outcomes = sorted(record["outcome"] for record in records(tmp_path))
    expected = ["CANCELLED", "CANCELLED", "DEADLINE_EXCEEDED", "END_OF_SEQUENCE", "INTERNAL", "RESOURCE_EXHAUSTED"]
    assert outcomes == expected


async def test_prompt_that_begins_alike_is_reused_by_its_account_only(
    serve_scripted: ServiceMaker, sharing_card: ModelCard
) -> None:
    """`usage` says how many input tokens were reused; at the same price, and strangers reuse none."""
    prompt = "Tell me a story. " * 150
    async with serve_scripted(REPLY, card=sharing_card, accounts=AccountsByHeader()) as service:

        async def usage(account: str, text: str) -> pb.Usage:
            request = pb.GenerateRequest(prompt=text, raw=True, max_tokens=2)
            reply = await service.text.Generate(request, metadata=as_account(account))
            return reply.completion.usage

        first, second = await usage("a", prompt), await usage("a", f"{prompt} And another one.")
        assert (await usage("b", f"{prompt} And a third one.")).reused_input_tokens == 0
    assert first.reused_input_tokens == 0
    assert first.input_tokens > second.reused_input_tokens > 0
    assert Decimal(second.neurons) == neurons(
        TokenUsage(second.input_tokens, second.output_tokens), sharing_card.neuron_costs
    )
