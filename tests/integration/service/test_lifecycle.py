"""Warm-up, readiness, a hung engine and the drain, over a real socket."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from tests.integration.service.conftest import limited
from tests.integration.usage.conftest import stored
from tests.support.deadlines import LoopClock
from tests.support.scripted_model import ScriptedModel
from tests.support.service import (
    Service,
    ServiceMaker,
    details,
    generate,
    health_stub,
    hold_slot,
    remaining_text,
    until,
)

from llama2.v1 import account_pb2, account_pb2_grpc
from llama2.v1 import text_generation_pb2 as pb
from llama2_server.api.server import SERVICES
from llama2_server.card import ModelCard
from llama2_server.configuration_error import ConfigurationError
from llama2_server.lifecycle import drain, readiness

REPLY = "Once upon a time, a fox 🦊 lived by the sea."
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def get_usage(service: Service) -> account_pb2.GetUsageResponse:
    """Return the usage and the quota of the client's account."""
    return await account_pb2_grpc.AccountServiceStub(service.channel).GetUsage(account_pb2.GetUsageRequest())


async def health_of(service: Service, name: str = "") -> int:
    """Return the status of a name in the health service."""
    answer = await health_stub(service.channel).Check(health_pb2.HealthCheckRequest(service=name))
    return int(answer.status)


async def check_nothing_is_counted(service: Service) -> None:
    """Check that the account's quota is complete and its usage empty."""
    usage = await get_usage(service)
    assert (usage.quota.requests_left, list(usage.days)) == (usage.quota.max_requests_per_min, [])


async def test_warm_up_is_not_billed(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """The model generates before SERVING, without a cost in quota and without a usage record."""
    async with serve_scripted() as service:
        assert service.model.decoded_rows
        await check_nothing_is_counted(service)
    assert await stored(f"sqlite:///{tmp_path / 'usage.db'}") == []


async def test_model_that_cannot_generate_is_not_served(serve_scripted: ServiceMaker) -> None:
    """A failed warm-up ends the startup before the port opens."""
    with pytest.raises(ConfigurationError, match="cannot generate"):
        async with serve_scripted(failure=RuntimeError("broken")):
            raise AssertionError("it is served")


async def test_idle_server_probes_its_model(serve_scripted: ServiceMaker, clock: LoopClock) -> None:
    """A server without calls generates once per interval, without a cost in quota and without a usage record."""
    # The clock also advances during the probes, whose steps must not time out.
    async with serve_scripted(readiness_probe_interval_seconds=60, engine_step_timeout_seconds=1e9) as service:
        while service.model.probes < 3:
            clock.advance(60)
            await asyncio.sleep(0)
        await check_nothing_is_counted(service)


async def test_probe_takes_no_place_in_the_queue(serve_scripted: ServiceMaker, clock: LoopClock) -> None:
    """A call that arrives during a probe gets the slot, even on a server without a queue."""
    async with serve_scripted(readiness_probe_interval_seconds=60, max_queue_size=0) as service:
        service.model.gate(probes=True)
        clock.advance(60)
        await service.wait_until_in_step()
        call = asyncio.create_task(generate(service, "a story", 20))
        await until(lambda: service.metrics.registry.get_sample_value("llama2_requests_running") == 1)
        assert service.model.prefills == service.model.probes == 0  # the probe still is in its first step
        service.model.open_gate()
        assert (await call).response


async def test_failed_engine_is_not_serving_until_a_probe_succeeds(
    serve_scripted: ServiceMaker, clock: LoopClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed generation, every service is NOT_SERVING; a probe makes it SERVING again without a client."""
    monkeypatch.setattr(readiness, "FIRST_RETRY_SECONDS", 60)  # the server ends after three failed probes
    async with serve_scripted(engine_step_timeout_seconds=1e9) as service:
        watches = [
            health_stub(service.channel).Watch(health_pb2.HealthCheckRequest(service=name))
            for name in ("", SERVICES[0])
        ]
        assert [(await watch.read()).status for watch in watches] == [SERVING] * 2
        service.model.failure = RuntimeError("broken")
        with pytest.raises(grpc.aio.AioRpcError):
            await generate(service, "a story", 20)
        assert [(await watch.read()).status for watch in watches] == [NOT_SERVING] * 2
        assert await health_of(service, "liveness") == SERVING
        service.model.failure = None
        recovery = [asyncio.create_task(watch.read()) for watch in watches]
        for change in recovery:
            await clock.expire(change)
            assert change.result().status == SERVING


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), MemoryError(), None])
async def test_request_that_fails_alone_changes_nothing(serve_scripted: ServiceMaker, error: Exception | None) -> None:
    """Out of memory and logits that are not finite (None) are INTERNAL, and the server stays SERVING."""
    async with serve_scripted() as service:
        watch = health_stub(service.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        service.model.failure, service.model.nan_logits = error, error is None
        for _ in range(4):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await generate(service, "a story", 20)
            assert failed.value.code() is grpc.StatusCode.INTERNAL
        service.model.failure, service.model.nan_logits = None, False
        assert (await generate(service, "a story", 20)).response
        assert service.model.probes == 0
        change = asyncio.create_task(watch.read())
        assert await health_of(service) == SERVING
        assert not change.done()
        change.cancel()


async def test_hung_step_fails_running_and_queued_requests(
    serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path, clock: LoopClock
) -> None:
    """Both get UNAVAILABLE with RetryInfo; the server is NOT_SERVING but alive; the computed tokens are recorded."""
    async with serve_scripted(engine_step_timeout_seconds=30, card=limited(demo_card, 10)) as service:
        running = await hold_slot(service)
        queued = asyncio.create_task(generate(service, "a story", 20))
        await service.wait_until_queued(1)
        clock.advance(30)  # shorter than the window of the quota
        for call, reason in ((running.read(), "ENGINE_UNAVAILABLE"), (queued, "SHUTTING_DOWN")):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call
            assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
            found = details(failed.value)
            assert isinstance(found["ErrorInfo"], error_details_pb2.ErrorInfo)
            assert found["ErrorInfo"].reason == reason
            assert "RetryInfo" in found
        assert await health_of(service) == NOT_SERVING
        assert await health_of(service, "liveness") == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await generate(service, "a story", 20)
        assert late.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (await get_usage(service)).quota.requests_left == 9  # the queued request got its quota back
    records = await stored(f"sqlite:///{tmp_path / 'usage.db'}")
    assert sorted((record.outcome, record.output_tokens) for record in records) == [
        ("UNAVAILABLE", 0),
        ("UNAVAILABLE", 1),
    ]
    assert max(record.input_tokens for record in records) > 0


async def test_hung_step_does_not_block_the_drain(
    serve_scripted: ServiceMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call gets UNAVAILABLE after the grace period, the computed tokens are recorded, and the drain ends."""
    monkeypatch.setattr(drain, "ENGINE_STOP_TIMEOUT_SECONDS", 0.1)  # always passes: the step never ends
    monkeypatch.setattr(drain, "STATUS_FLUSH_SECONDS", 60)
    try:
        async with asyncio.timeout(60), serve_scripted(shutdown_grace_seconds=0) as service:
            monkeypatch.setattr(service.model, "open_gate", lambda: None)  # the drain does not end the step either
            reading = asyncio.create_task((await hold_slot(service)).read())
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await reading
        assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        ScriptedModel.open_gate(service.model)
    (record,) = await stored(f"sqlite:///{tmp_path / 'usage.db'}")
    assert (record.outcome, record.output_tokens) == ("UNAVAILABLE", 1)


async def test_drain_completes_running_and_rejects_queued_calls(serve_scripted: ServiceMaker) -> None:
    """Watches get NOT_SERVING and end, queued calls get UNAVAILABLE with RetryInfo, and running calls complete."""
    async with serve_scripted(REPLY) as service:
        holder = await hold_slot(service)
        watch = health_stub(service.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        queued = asyncio.create_task(generate(service, "queued", 2))
        await service.wait_until_queued(1)
        rejecting = asyncio.create_task(_retry_info(queued))
        reading = asyncio.create_task(remaining_text(holder))
        statuses = asyncio.create_task(_statuses(watch))
    assert isinstance(await rejecting, error_details_pb2.RetryInfo)
    assert REPLY.endswith(await reading)
    assert await statuses == [NOT_SERVING]


async def _retry_info(call: "asyncio.Task[pb.GenerateResponse]") -> Message:
    with pytest.raises(grpc.aio.AioRpcError) as rejected:
        await call
    assert rejected.value.code() is grpc.StatusCode.UNAVAILABLE
    return details(rejected.value)["RetryInfo"]


async def _statuses(watch: Any) -> list[int]:
    statuses = []
    while isinstance(message := await watch.read(), health_pb2.HealthCheckResponse):
        statuses.append(message.status)
    return statuses
