"""Metrics of a running service, as Prometheus scrapes them."""

import asyncio
import contextlib
import re
import shutil
import subprocess
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from tests.integration.telemetry.conftest import Watched, sample, scrape
from tests.support.deadlines import CallDeadlines, server_deadline
from tests.support.processes import free_port
from tests.support.servers.redis_server import running_redis
from tests.support.service import (
    Service,
    ServiceMaker,
    disconnect,
    health_stub,
    hold_slot,
    reflection_stub,
    remaining_text,
    until,
    with_config,
)
from tools.metrics_reference import PAGE

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard, RequestsPerMinute
from llama2_server.telemetry.metrics import Metrics

REPLY = "Once upon a time, a fox lived by the sea."
GENERATE = "llama2.v1.TextGenerationService/Generate"
STREAM = "llama2.v1.TextGenerationService/GenerateStream"
OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}
UNITS = ("seconds", "bytes")
LABELS = {"method", "code", "type", "phase", "version", "model", "device", "dtype", "step", "kernels", "result", "le"}


def problems(family: Metric) -> list[str]:
    """Return the violations of Prometheus' naming conventions, which promtool checks."""
    name, found = family.name, []
    if not family.documentation or family.documentation[-1] != ".":
        found.append("help must be a sentence")
    if not re.fullmatch(r"(llama2|process)_[a-z0-9_]+", name):
        found.append("snake case, with a prefix")
    if re.search(r"_(total|sum|count|bucket|created)$", name):
        found.append("a suffix that is reserved")
    if re.search(r"milli|micro|nano|_ms|_kb|minutes|hours|percent|gauge|counter|histogram", name):
        found.append("a base unit, and no type")
    if family.type == "histogram" and not name.endswith("_seconds"):
        found.append("a histogram needs a unit")
    if any(unit in name and not name.removesuffix("_max").endswith(unit) for unit in UNITS):
        found.append("the unit comes last")
    if family.type == "info" and "_info" in name:
        found.append("info is added by itself")
    found += [f"label {label}" for one in family.samples for label in one.labels if label not in LABELS]
    return [f"{name}: {problem}" for problem in found]


async def test_scrape_follows_the_conventions(serve_scripted: ServiceMaker) -> None:
    """A scrape is valid OpenMetrics, follows the naming conventions, and has exactly the documented metrics."""
    port = free_port()
    async with serve_scripted(REPLY, metrics_listen=f"127.0.0.1:{port}") as service:
        await service.text.Generate(pb.GenerateRequest(prompt="x"))
        text = await scrape(f"127.0.0.1:{port}", OPENMETRICS)
    parse: Any = text_string_to_metric_families  # strict: it rejects everything that the specification rejects
    families: list[Metric] = list(parse(text))
    assert [problem for family in families for problem in problems(family)] == []
    names = [family.name for family in families]
    assert len(set(names)) == len(names)
    documented = re.findall(r"^\| `(llama2_\w+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for name in names if name.startswith("llama2_")} == {
        re.sub("_(total|info)$", "", name) for name in documented
    }


async def test_scrape_passes_promtool(serve_scripted: ServiceMaker) -> None:
    """Prometheus' own checker reports no problem."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("NOT TESTED WITH PROMTOOL: promtool is not installed (Debian: it is in the package prometheus)")
    port = free_port()
    async with serve_scripted(REPLY, metrics_listen=f"127.0.0.1:{port}") as service:
        await service.text.Generate(pb.GenerateRequest(prompt="x"))
        text = await scrape(f"127.0.0.1:{port}")
    command = [promtool, "check", "metrics"]
    checked = await asyncio.to_thread(subprocess.run, command, input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


async def test_calls_are_counted_by_method_and_code(
    serve_scripted: ServiceMaker, watched: Watched, deadlines: CallDeadlines
) -> None:
    """Every call is counted under its method and code, however it ends."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        await service.text.Generate(pb.GenerateRequest(prompt="x"))
        malformed: Any = service.channel.unary_unary(f"/{GENERATE}")
        for rejected in (service.text.Generate(pb.GenerateRequest(prompt="x", top_p=2)), malformed(b"\xff")):
            with pytest.raises(grpc.aio.AioRpcError):
                await rejected
        service.model.gate()
        late = service.text.Generate(pb.GenerateRequest(prompt="x"), metadata=server_deadline())
        await service.wait_until_in_step()
        deadlines.expire()
        with pytest.raises(grpc.aio.AioRpcError):
            await late
        service.model.open_gate()
        await until(lambda: watched.value("llama2_requests_running") == 0)
        await disconnect(service, await hold_slot(service))
        service.model.open_gate()
        await health_stub(service.channel).Check(health_pb2.HealthCheckRequest())
        with pytest.raises(grpc.aio.AioRpcError):
            await health_stub(service.channel).Check(health_pb2.HealthCheckRequest(service="none"))
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        assert [answer async for answer in reflection_stub(service.channel).ServerReflectionInfo(iter([ask]))]
        counted = {
            (one.labels["method"], one.labels["code"]): one.value
            for family in watched.telemetry.metrics.registry.collect()
            for one in family.samples
            if one.name == "llama2_requests_total" and one.value
        }
        assert watched.value("llama2_request_duration_seconds_count", method=GENERATE) == 4
    assert counted == {
        (GENERATE, "OK"): 1,
        (GENERATE, "INVALID_ARGUMENT"): 2,
        (GENERATE, "DEADLINE_EXCEEDED"): 1,
        (STREAM, "CANCELLED"): 1,
        ("grpc.health.v1.Health/Check", "OK"): 1,
        ("grpc.health.v1.Health/Check", "NOT_FOUND"): 1,
        ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "OK"): 1,
    }


async def test_clients_cannot_add_labels(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """All methods that do not exist share one series."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        before = generate_latest(watched.telemetry.metrics.registry).count(b"\n")
        for number in range(20):
            unknown_method: Any = service.channel.unary_unary(f"/unknown.Service/Method{number}")
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await unknown_method(b"")
            assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert watched.value("llama2_requests_total", method="unknown", code="UNIMPLEMENTED") == 20
        assert generate_latest(watched.telemetry.metrics.registry).count(b"\n") == before + 1


async def test_times_of_a_generation(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A generation adds one queue time, one first token time and one mean time per token; every engine step counts."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        await until(lambda: steps(watched) == [2, 2])  # the warm-up: two generations of two tokens
        reply = await service.text.Generate(pb.GenerateRequest(prompt="x"))
        await service.text.Generate(pb.GenerateRequest(prompt="x", max_tokens=1))
        await until(lambda: watched.value("llama2_time_to_first_token_seconds_count") == 2)
        assert watched.value("llama2_queue_time_seconds_count") == 2
        assert watched.value("llama2_time_per_output_token_seconds_count") == 1
        await until(lambda: steps(watched) == [4, 2 + reply.completion.usage.output_tokens - 1])


def steps(watched: Watched) -> list[float]:
    counts = [
        watched.value("llama2_engine_step_duration_seconds_count", phase=phase) for phase in ("prefill", "decode")
    ]
    return [count for count in counts if count is not None]


async def test_queue_and_slots(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A scrape shows queued and running requests; the queue time of a cancelled request counts."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        held = await hold_slot(service)
        waiting = service.text.Generate(pb.GenerateRequest(prompt="x"))
        await until(lambda: watched.value("llama2_requests_queued") == 1)
        assert (watched.value("llama2_requests_running"), watched.value("llama2_max_concurrent_requests")) == (1, 1)
        assert watched.value("llama2_queue_time_seconds_count") == 1
        waiting.cancel()
        await until(lambda: watched.value("llama2_queue_time_seconds_count") == 2)
        assert watched.value("llama2_requests_queued") == 0
        service.model.open_gate()
        await remaining_text(held)
        await until(lambda: watched.value("llama2_requests_running") == 0)


async def test_rejections_by_the_queue(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """Autoscaling sees the calls that the full queue rejected, and how long a request holds its slot."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry, max_queue_size=0) as service:
        held = await hold_slot(service)
        assert watched.value("llama2_mean_slot_time_seconds") == 0
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError) as rejected:
                await service.text.Generate(pb.GenerateRequest(prompt="x"))
            assert rejected.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert watched.value("llama2_queue_rejections_total") == 2
        assert watched.value("llama2_quota_rejections_total") == 0
        service.model.open_gate()
        await remaining_text(held)
        await until(lambda: (watched.value("llama2_mean_slot_time_seconds") or 0) > 0)


async def test_quota_and_response_cache(serve_scripted: ServiceMaker, demo_card: ModelCard, watched: Watched) -> None:
    """Rejections by the quota, and hits, misses and bytes of the response cache."""
    card = with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=2))
    async with serve_scripted(REPLY, card=card, telemetry=watched.telemetry) as service:
        for _ in range(2):
            await service.text.Generate(pb.GenerateRequest(prompt="x"))
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError):
                await service.text.Generate(pb.GenerateRequest(prompt="x"))
        # The last rejection may be counted after the caller has its error.
        await until(lambda: watched.value("llama2_quota_rejections_total") == 3)
        assert [watched.value(f"llama2_response_cache_{what}_total") for what in ("hits", "misses")] == [1, 1]
        assert (watched.value("llama2_response_cache_bytes") or 0) > len(REPLY)
        assert watched.value("llama2_quota_store_up") == 1


async def test_unavailable_quota_store(
    serve_scripted: ServiceMaker, watched: Watched, tmp_path: Path, patient_stores: None
) -> None:
    """While the quota store does not answer, its gauge is 0, and every affected request is counted."""
    request = pb.GenerateRequest(prompt="x")
    with running_redis(tmp_path) as redis:
        async with serve_scripted(REPLY, telemetry=watched.telemetry, redis_url=redis.url) as service:
            await service.text.Generate(request)
            assert watched.value("llama2_quota_store_up") == 1
            redis.kill()
            with pytest.raises(grpc.aio.AioRpcError) as rejected:
                await service.text.Generate(request)
            assert rejected.value.code() is grpc.StatusCode.UNAVAILABLE
            assert watched.value("llama2_quota_store_up") == 0
            assert watched.value("llama2_quota_store_errors_total") == 1
            redis.start()
            async with asyncio.timeout(60):
                while watched.value("llama2_quota_store_up") == 0:
                    with contextlib.suppress(grpc.aio.AioRpcError):  # the client pauses for a second
                        await service.text.Generate(request)


async def test_ledger_memory_and_build(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """Size of the usage database, pending records, memory and build information."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        await service.text.Generate(pb.GenerateRequest(prompt="x"))
        await until(lambda: watched.value("llama2_usage_pending_records") == 0)
        assert watched.value("llama2_usage_lag_seconds") == 0
        assert (watched.value("llama2_usage_database_bytes") or 0) > 0
        assert watched.value("llama2_device_memory_bytes") == service.model.memory_bytes
        assert (watched.value("process_resident_memory_bytes") or 0) > 10**7
        text = generate_latest(watched.telemetry.metrics.registry).decode()
        assert re.search(
            r'^llama2_build_info\{device="cpu",dtype="float32",kernels="",model="@demo/storyteller",step="torch",version="\d.*"\}',
            text,
            re.M,
        )


async def test_metrics_are_served_until_the_drain_is_over(
    serve_scripted: ServiceMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While running calls finish in a drain, the metrics report that the server is not ready; then the port closes."""
    address = f"127.0.0.1:{free_port()}"
    async with AsyncExitStack() as streams, AsyncExitStack() as stack:
        service: Service = await stack.enter_async_context(serve_scripted(REPLY, metrics_listen=address))
        assert sample(await scrape(address), "llama2_ready") == 1
        # Its own channel: the fixture closes the other one at the end of the drain, whatever the client has read.
        channel = await streams.enter_async_context(grpc.aio.insecure_channel(service.address))
        held = await hold_slot(replace(service, text=type(service.text)(channel)))
        release = service.model.open_gate
        monkeypatch.setattr(service.model, "open_gate", lambda: None)  # which the fixture calls at its end
        ending = asyncio.create_task(stack.pop_all().aclose())
        while sample(text := await scrape(address), "llama2_ready"):
            assert not ending.done()
        assert sample(text, "llama2_requests_running") == 1
        release()
        await remaining_text(held)
        await ending
    with pytest.raises(OSError):
        await scrape(address)


def test_nothing_is_on_the_global_registry() -> None:
    """Two services in one process do not share metrics, because each has its own registry."""
    first, second = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    first.unknown_method()
    assert (
        second.registry.get_sample_value("llama2_requests_total", {"method": "unknown", "code": "UNIMPLEMENTED"})
        is None
    )
