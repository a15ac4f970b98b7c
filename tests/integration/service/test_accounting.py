"""Quotas and usage records over a real socket, on a scripted model."""

import asyncio
from decimal import Decimal
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from tests.integration.service.conftest import limited, records
from tests.integration.usage.conftest import locked, stored
from tests.support.accounts import AccountByHeader, as_account
from tests.support.deadlines import CallDeadlines, server_deadline
from tests.support.service import ServiceMaker, details, disconnect, generate, hold_slot, until, with_config

from llama2.v1 import account_pb2, account_pb2_grpc, model_pb2
from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard, RequestsPerMinute
from llama2_server.usage.pricing import TokenUsage, neurons

REPLY = "Once upon a time, a fox 🦊 lived by the sea."


async def test_quota_is_exact(serve_scripted: ServiceMaker, demo_card: ModelCard) -> None:
    """Request N+1 is rejected with QuotaFailure and RetryInfo; invalid requests and other methods cost no quota."""
    card = with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=1, accounts={"b": 3}))
    async with serve_scripted(REPLY, card=card, accounts=AccountByHeader()) as service:
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
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await service.text.Generate(pb.GenerateRequest(prompt="x"), metadata=as_account("b"))
        assert rejected.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        found = details(rejected.value)
        failure, retry = found["QuotaFailure"], found["RetryInfo"]
        assert isinstance(failure, error_details_pb2.QuotaFailure)
        assert isinstance(retry, error_details_pb2.RetryInfo)
        assert failure.violations[0].subject == "account:b"
        assert 0 < retry.retry_delay.ToMilliseconds() <= 60_000
        await service.text.Generate(pb.GenerateRequest(prompt="x"), metadata=as_account("a"))


async def test_get_usage_returns_the_totals_of_the_account(
    serve_scripted: ServiceMaker, caching_card: ModelCard
) -> None:
    """GetUsage counts every admitted request of the account exactly, and no other account's requests."""
    async with serve_scripted(REPLY, card=caching_card, accounts=AccountByHeader()) as service:
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
        assert (usage.account, day.model, day.requests) == ("a", caching_card.name, 3)
        assert day.input_tokens == sum(completion.usage.input_tokens for completion in computed)
        assert day.output_tokens == sum(completion.usage.output_tokens for completion in computed)
        assert Decimal(day.neurons) == sum(Decimal(reply.completion.usage.neurons) for reply in replies)
        counts = TokenUsage(day.input_tokens, day.output_tokens)
        assert Decimal(day.neurons) == neurons(counts, caching_card.neuron_costs)
        assert day.cached_tokens > 0


@pytest.mark.parametrize(("since", "until"), [("yesterday", None), (None, "2026-13-01"), ("2026-02-02", "2026-02-01")])
async def test_get_usage_rejects_invalid_dates(
    serve_scripted: ServiceMaker, since: str | None, until: str | None
) -> None:
    """An invalid date and a reversed range are violations with their field."""
    async with serve_scripted() as service:
        request = account_pb2.GetUsageRequest(since=since or "", until=until or "")
        if since is None:
            request.ClearField("since")
        if until is None:
            request.ClearField("until")
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await account_pb2_grpc.AccountServiceStub(service.channel).GetUsage(request)
        assert rejected.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "BadRequest" in details(rejected.value)


async def test_every_admitted_request_has_one_record(
    serve_scripted: ServiceMaker, caching_card: ModelCard, tmp_path: Path, deadlines: CallDeadlines
) -> None:
    """Finished, cancelled in the queue or while generating, expired, failed: one record. Queue full: no record."""
    async with serve_scripted(REPLY, card=caching_card, max_queue_size=1) as service:
        await service.text.Generate(pb.GenerateRequest(prompt="finished"))
        holder = await hold_slot(service)
        expiring = service.text.Generate(pb.GenerateRequest(prompt="expired"), metadata=server_deadline())
        await service.wait_until_queued(1)
        deadlines.expire()
        with pytest.raises(grpc.aio.AioRpcError):
            await expiring
        await until(lambda: len(list(records(tmp_path))) == 2)
        queued = service.text.GenerateStream(pb.GenerateRequest(prompt="queued"))
        reading = asyncio.create_task(queued.read())
        await service.wait_until_queued(1)
        with pytest.raises(grpc.aio.AioRpcError):
            await service.text.Generate(pb.GenerateRequest(prompt="one too many"))
        await disconnect(service, queued, holder)
        await asyncio.wait([reading])
        service.model.open_gate()
        await until(lambda: len(list(records(tmp_path))) == 4)
        service.model.failure = RuntimeError("broken")
        with pytest.raises(grpc.aio.AioRpcError):
            await service.text.Generate(pb.GenerateRequest(prompt="failed"))
    outcomes = sorted(record["outcome"] for record in records(tmp_path))
    assert outcomes == ["CANCELLED", "CANCELLED", "DEADLINE_EXCEEDED", "END_OF_SEQUENCE", "INTERNAL"]


async def test_prefix_is_reused_within_its_account_only(serve_scripted: ServiceMaker, caching_card: ModelCard) -> None:
    """`usage` has the number of reused input tokens; their price is the same, and other accounts reuse none."""
    prompt = "Tell me a story. " * 150
    async with serve_scripted(REPLY, card=caching_card, accounts=AccountByHeader()) as service:

        async def usage(account: str, text: str) -> pb.Usage:
            request = pb.GenerateRequest(prompt=text, raw=True, max_tokens=2)
            reply = await service.text.Generate(request, metadata=as_account(account))
            return reply.completion.usage

        first, second = await usage("a", prompt), await usage("a", f"{prompt} And another one.")
        assert (await usage("b", f"{prompt} And a third one.")).reused_input_tokens == 0
    assert first.reused_input_tokens == 0
    assert first.input_tokens > second.reused_input_tokens > 0
    assert Decimal(second.neurons) == neurons(
        TokenUsage(second.input_tokens, second.output_tokens), caching_card.neuron_costs
    )


async def test_request_without_record_costs_no_quota(
    serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path
) -> None:
    """Each attempt of a request that cannot be recorded is USAGE_UNAVAILABLE and costs no quota."""
    async with serve_scripted(card=limited(demo_card, 10**4)) as service:
        with locked(tmp_path / "usage.db"):
            admitted, rejected = 0, 0
            while rejected < 4:
                try:
                    await generate(service, "a story", 20)
                    admitted += 1
                except grpc.aio.AioRpcError as error:
                    info = details(error)["ErrorInfo"]
                    assert isinstance(info, error_details_pb2.ErrorInfo)
                    assert info.reason == "USAGE_UNAVAILABLE"
                    rejected += 1
        usage = await account_pb2_grpc.AccountServiceStub(service.channel).GetUsage(account_pb2.GetUsageRequest())
        assert usage.quota.requests_left == 10**4 - admitted


async def test_request_beyond_the_quota_leaves_no_record(
    serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path
) -> None:
    """Only the admitted request has a record."""
    async with serve_scripted(card=limited(demo_card, 1)) as service:
        await generate(service, "a story", 20)
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError):
                await generate(service, "a story", 20)
    assert len(await stored(f"sqlite:///{tmp_path / 'usage.db'}")) == 1
