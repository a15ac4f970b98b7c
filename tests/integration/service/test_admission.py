"""The order of admission over a real socket: cache and running generations, queue, quota, usage record, refunds."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from tests.integration.service.conftest import records
from tests.support.accounts import AccountByHeader, as_account
from tests.support.deadlines import LoopClock
from tests.support.servers.redis_server import running_redis
from tests.support.service import Service, ServiceMaker, details, hold_slot, remaining_text, until, with_config

from llama2.v1 import account_pb2, account_pb2_grpc
from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard, RequestsPerMinute

LIMIT = 100


@pytest.fixture
def limited_card(demo_card: ModelCard) -> ModelCard:
    """Return the demo card with its response cache and a quota of 100; 1 for the account `small`."""
    return with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=LIMIT, accounts={"small": 1}))


def start(service: Service, prompt: str, account_id: str = "a") -> "asyncio.Task[pb.GenerateResponse]":
    async def call() -> pb.GenerateResponse:
        return await service.text.Generate(pb.GenerateRequest(prompt=prompt), metadata=as_account(account_id))

    return asyncio.create_task(call())


async def rejection(call: "asyncio.Task[pb.GenerateResponse]") -> str:
    """Return the reason of a call's error."""
    with pytest.raises(grpc.aio.AioRpcError) as rejected:
        await call
    info = details(rejected.value)["ErrorInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    return str(info.reason)


async def used(service: Service, account_id: str = "a") -> int:
    """Return the used requests of the account's quota."""
    stub: Any = account_pb2_grpc.AccountServiceStub(service.channel)
    usage = await stub.GetUsage(account_pb2.GetUsageRequest(), metadata=as_account(account_id))
    return int(usage.quota.max_requests_per_min - usage.quota.requests_left)


async def test_only_a_new_generation_needs_the_queue(
    serve_scripted: ServiceMaker, limited_card: ModelCard, tmp_path: Path
) -> None:
    """With a full queue, a cached and a running reply cost one request; a rejected call costs none, has no record."""
    async with serve_scripted("Hi.", card=limited_card, max_queue_size=0) as service:
        await start(service, "cached")
        running = await hold_slot(service, "running")
        joined = start(service, "running")
        assert (await start(service, "cached")).completion.cached
        for _ in range(5):
            assert await rejection(start(service, "new")) == "QUEUE_FULL"
        service.model.open_gate()
        await remaining_text(running)
        assert (await joined).completion.cached
        assert await used(service) == 4
    assert sorted(record["outcome"] for record in records(tmp_path)) == ["END_OF_SEQUENCE"] * 4


async def test_quota_rejection_gives_the_space_in_the_queue_back(
    serve_scripted: ServiceMaker, limited_card: ModelCard
) -> None:
    """A call beyond its quota leaves the queue, so that the next call gets its space."""
    async with serve_scripted("Hi.", card=limited_card, max_queue_size=1, accounts=AccountByHeader()) as service:
        await start(service, "first", "small")
        held = await hold_slot(service)
        for _ in range(3):
            assert await rejection(start(service, "second", "small")) == "QUOTA_EXCEEDED"
        queued = start(service, "third", "b")
        await service.wait_until_queued(1)
        service.model.open_gate()
        assert (await queued).response == "Hi."
        await remaining_text(held)


async def test_retry_time_is_the_later_one_of_queue_and_quota(
    serve_scripted: ServiceMaker, limited_card: ModelCard
) -> None:
    """A full queue rejects a call whose account also has no quota left; its RetryInfo is the quota's time."""
    async with serve_scripted("Hi.", card=limited_card, max_queue_size=0, accounts=AccountByHeader()) as service:
        await start(service, "first", "small")
        held = await hold_slot(service)
        for account_id, least, most in (("small", 50, 61), ("b", 0, 50)):
            with pytest.raises(grpc.aio.AioRpcError) as rejected:
                await start(service, "second", account_id)
            found = details(rejected.value)
            info, retry = found["ErrorInfo"], found["RetryInfo"]
            assert isinstance(info, error_details_pb2.ErrorInfo)
            assert isinstance(retry, error_details_pb2.RetryInfo)
            assert info.reason == "QUEUE_FULL"
            assert least < retry.retry_delay.ToTimedelta().total_seconds() < most
        service.model.open_gate()
        await remaining_text(held)


async def test_space_in_the_queue_is_reserved_before_the_quota(
    serve_scripted: ServiceMaker, limited_card: ModelCard, tmp_path: Path
) -> None:
    """While Redis counts the first of six calls, the other five are rejected; they cost no quota."""
    with running_redis(tmp_path) as redis:
        async with serve_scripted(
            "Hi.", card=limited_card, max_queue_size=1, accounts=AccountByHeader(), redis_url=redis.url
        ) as service:
            held = await hold_slot(service)
            calls = [start(service, f"prompt {index}", "b") for index in range(6)]
            await until(lambda: sum(call.done() for call in calls) == 5)
            service.model.open_gate()
            results = await asyncio.gather(*calls, return_exceptions=True)
            errors = [error for error in results if isinstance(error, grpc.aio.AioRpcError)]
            assert {error.code() for error in errors} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert (len(errors), await used(service, "b")) == (5, 1)
            await remaining_text(held)


async def test_displaced_calls_get_their_quota_back(
    serve_scripted: ServiceMaker, limited_card: ModelCard, tmp_path: Path
) -> None:
    """All readers of a displaced generation fail with QUEUE_FULL, get their quota back and have records of 0 tokens."""
    async with serve_scripted("Hi.", card=limited_card, max_queue_size=2, accounts=AccountByHeader()) as service:
        held = await hold_slot(service)
        first = start(service, "first")
        await service.wait_until_queued(1)
        readers = [start(service, "second") for _ in range(3)]
        await service.wait_until_queued(2)
        await wait_until_used(service, 5)
        other = start(service, "other", "b")
        assert [await rejection(reader) for reader in readers] == ["QUEUE_FULL"] * 3
        assert (await used(service), await used(service, "b")) == (2, 1)
        service.model.open_gate()
        assert [(await call).response for call in (first, other)] == ["Hi."] * 2
        await remaining_text(held)
    displaced = [record for record in records(tmp_path) if record["outcome"] == "RESOURCE_EXHAUSTED"]
    assert [(record["input_tokens"], record["output_tokens"]) for record in displaced] == [(0, 0)] * 3


async def test_queue_timeout_gives_the_quota_back(
    serve_scripted: ServiceMaker, limited_card: ModelCard, clock: LoopClock
) -> None:
    """A call that waits longer than the queue timeout costs no quota."""
    async with serve_scripted("Hi.", card=limited_card, queue_timeout_seconds=30) as service:
        held = await hold_slot(service)
        late = start(service, "late")
        await service.wait_until_queued(1)
        clock.advance(30)  # shorter than the window of the quota
        assert await rejection(late) == "QUEUE_WAIT_TOO_LONG"
        assert await used(service) == 1
        service.model.open_gate()
        await remaining_text(held)


async def test_drain_gives_the_quota_back(
    serve_scripted: ServiceMaker, limited_card: ModelCard, tmp_path: Path, patient_stores: None
) -> None:
    """Queued calls of a server that shuts down cost no quota in Redis; its running call costs one request."""
    with running_redis(tmp_path) as redis:
        arguments: dict[str, Any] = {"card": limited_card, "redis_url": redis.url}
        async with serve_scripted("Hi.", data_directory=tmp_path / "1", **arguments) as one:
            held = await hold_slot(one)
            queued = [start(one, f"prompt {index}") for index in range(3)]
            await one.wait_until_queued(3)
            assert await used(one, "anonymous") == 4
            leaving = asyncio.gather(*map(rejection, queued))
        assert await leaving == ["SHUTTING_DOWN"] * 3
        held.cancel()
        async with serve_scripted("Hi.", data_directory=tmp_path / "2", **arguments) as two:
            assert await used(two, "anonymous") == 1


async def wait_until_used(service: Service, requests: int) -> None:
    """Wait until the account `a` has used this many requests of its quota."""
    async with asyncio.timeout(10):
        while await used(service) != requests:
            await asyncio.sleep(0)
