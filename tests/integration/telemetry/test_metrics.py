"""The metrics of a running service, as Prometheus scrapes them."""

import asyncio
import contextlib
import re
import shutil
import socket
import subprocess
import urllib.request
from contextlib import AsyncExitStack
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
from tests.integration.telemetry.conftest import Watched
from tests.support.processes import free_port
from tests.support.redis_server import running_redis
from tests.support.service import (
    Service,
    ServiceMaker,
    hang_up,
    health_stub,
    hold_the_slot,
    reflection_stub,
    server_deadline,
    text_of,
    until,
    with_config,
)
from tools.metrics_reference import PAGE

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.api import health as health_module
from llama2_server.api.health import HealthServicer, ReadinessCollector
from llama2_server.card import ModelCard, RequestsPerMinute
from llama2_server.telemetry.errors import TelemetryError
from llama2_server.telemetry.metrics import Metrics
from llama2_server.telemetry.metrics_server import metrics_server
from llama2_server.telemetry.telemetry import open_telemetry

REPLY = "Once upon a time, a fox lived by the sea."
GENERATE = "llama2.v1.TextGenerationService/Generate"
STREAM = "llama2.v1.TextGenerationService/GenerateStream"
OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}
UNITS = ("seconds", "bytes")
LABELS = {"method", "code", "type", "phase", "version", "model", "device", "dtype", "le"}


async def scrape(address: str, headers: dict[str, str] | None = None) -> str:
    """What Prometheus would read."""
    request = urllib.request.Request(f"http://{address}/metrics", headers=headers or {})

    def read() -> str:
        with urllib.request.urlopen(request, timeout=30) as answer:
            text: str = answer.read().decode()
            return text

    return await asyncio.to_thread(read)


def sample(text: str, series: str) -> float:
    """The value of a series, written as in the text format."""
    found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
    assert found, f"no {series}"
    return float(found[1])


def problems(family: Metric) -> list[str]:
    """What promtool's linter, and the conventions that it stands for, would say of a metric."""
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


async def test_scrape_passes_the_linters(serve_scripted: ServiceMaker) -> None:
    """What is scraped, over HTTP and in both formats, is well-formed, and names, units and help follow the rules."""
    port = free_port()
    async with serve_scripted(REPLY, metrics_listen=f"127.0.0.1:{port}") as service:
        await service.text.Generate(pb.GenerateRequest(prompt="x"))
        text = await scrape(f"127.0.0.1:{port}", OPENMETRICS)
    parse: Any = text_string_to_metric_families  # strict: it refuses what the specification does
    families: list[Metric] = list(parse(text))
    assert [problem for family in families for problem in problems(family)] == []
    names = [family.name for family in families]
    assert len(set(names)) == len(names)
    documented = re.findall(r"^\| `(llama2_\w+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for name in names if name.startswith("llama2_")} == {
        re.sub("_(total|info)$", "", name) for name in documented
    }


async def test_scrape_passes_promtool(serve_scripted: ServiceMaker) -> None:
    """Prometheus' own checker has nothing to say."""
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


async def test_calls_are_counted_by_method_and_code(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """Every way for a call to end is counted under its method and code, whoever ended it."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        await service.text.Generate(pb.GenerateRequest(prompt="x"))
        malformed: Any = service.channel.unary_unary(f"/{GENERATE}")
        for refused in (service.text.Generate(pb.GenerateRequest(prompt="x", top_p=2)), malformed(b"\xff")):
            with pytest.raises(grpc.aio.AioRpcError):
                await refused
        service.model.gate()
        with pytest.raises(grpc.aio.AioRpcError):
            await service.text.Generate(pb.GenerateRequest(prompt="x"), metadata=server_deadline(200))
        service.model.open_gate()
        await until(lambda: watched.value("llama2_requests_running") == 0)
        await hang_up(service, await hold_the_slot(service))
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


async def test_callers_cannot_grow_the_labels(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """Methods that do not exist are one series, however many there are."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        before = generate_latest(watched.telemetry.metrics.registry).count(b"\n")
        for number in range(20):
            made_up: Any = service.channel.unary_unary(f"/made.up.Service/Method{number}")
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await made_up(b"")
            assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert watched.value("llama2_requests_total", method="unknown", code="UNIMPLEMENTED") == 20
        assert generate_latest(watched.telemetry.metrics.registry).count(b"\n") == before + 1


async def test_times_of_a_generation(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A generation is one wait, one first token and one mean time of the others; every step of the engine counts."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        await until(lambda: steps(watched) == [2, 2])  # of the warm-up: two generations of two tokens
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


async def test_line_and_slots_are_seen(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A scrape shows who waits and who runs right now; a wait that is given up is a wait."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        held = await hold_the_slot(service)
        waiting = service.text.Generate(pb.GenerateRequest(prompt="x"))
        await until(lambda: watched.value("llama2_requests_queued") == 1)
        assert (watched.value("llama2_requests_running"), watched.value("llama2_max_concurrent_requests")) == (1, 1)
        assert watched.value("llama2_queue_time_seconds_count") == 1
        waiting.cancel()
        await until(lambda: watched.value("llama2_queue_time_seconds_count") == 2)
        assert watched.value("llama2_requests_queued") == 0
        service.model.open_gate()
        await text_of(held)
        await until(lambda: watched.value("llama2_requests_running") == 0)


async def test_quota_and_cache_are_seen(serve_scripted: ServiceMaker, demo_card: ModelCard, watched: Watched) -> None:
    """Refusals by the quota, and hits, misses and bytes of the response cache."""
    card = with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=2))
    async with serve_scripted(REPLY, card=card, telemetry=watched.telemetry) as service:
        for _ in range(2):
            await service.text.Generate(pb.GenerateRequest(prompt="x"))
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError):
                await service.text.Generate(pb.GenerateRequest(prompt="x"))
        assert watched.value("llama2_quota_rejections_total") == 3
        assert [watched.value(f"llama2_response_cache_{what}_total") for what in ("hits", "misses")] == [1, 1]
        assert (watched.value("llama2_response_cache_bytes") or 0) > len(REPLY)
        assert watched.value("llama2_quota_store_up") == 1


async def test_redis_that_is_gone_is_seen(serve_scripted: ServiceMaker, watched: Watched, tmp_path: Path) -> None:
    """While the quota store does not answer its gauge is 0 and each request that it failed is counted."""
    request = pb.GenerateRequest(prompt="x")
    with running_redis(tmp_path) as redis:
        async with serve_scripted(REPLY, telemetry=watched.telemetry, redis_url=redis.url) as service:
            await service.text.Generate(request)
            assert watched.value("llama2_quota_store_up") == 1
            redis.kill()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await service.text.Generate(request)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            assert watched.value("llama2_quota_store_up") == 0
            assert watched.value("llama2_quota_store_errors_total") == 1
            redis.start()
            async with asyncio.timeout(10):
                while watched.value("llama2_quota_store_up") == 0:
                    with contextlib.suppress(grpc.aio.AioRpcError):  # the store is left alone for a second
                        await service.text.Generate(request)


async def test_ledger_and_build_are_seen(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """The journal's size, what waits for the store, the memory, and what is running."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        await service.text.Generate(pb.GenerateRequest(prompt="x"))
        await until(lambda: watched.value("llama2_usage_pending_records") == 0)
        assert watched.value("llama2_usage_lag_seconds") == 0
        assert (watched.value("llama2_usage_journal_bytes") or 0) > 0
        assert watched.value("llama2_device_memory_bytes") == service.model.memory_bytes
        assert (watched.value("process_resident_memory_bytes") or 0) > 10**7
        text = generate_latest(watched.telemetry.metrics.registry).decode()
        assert re.search(
            r'^llama2_build_info\{device="cpu",dtype="float32",model="@demo/storyteller",version="\d.*"\} 1', text, re.M
        )


async def test_metrics_are_served_until_the_drain_is_over(
    serve_scripted: ServiceMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While running calls finish, the metrics say that the server does not serve; then the port closes."""
    address = f"127.0.0.1:{free_port()}"
    async with AsyncExitStack() as stack:
        service: Service = await stack.enter_async_context(serve_scripted(REPLY, metrics_listen=address))
        assert sample(await scrape(address), "llama2_ready") == 1
        held = await hold_the_slot(service)
        release = service.model.open_gate
        monkeypatch.setattr(service.model, "open_gate", lambda: None)  # the fixture's own end would release it
        ending = asyncio.create_task(stack.pop_all().aclose())
        while sample(text := await scrape(address), "llama2_ready"):
            assert not ending.done()
        assert sample(text, "llama2_requests_running") == 1
        release()
        await text_of(held)
        await ending
    with pytest.raises(OSError):
        await scrape(address)


async def test_port_in_use_is_one_line() -> None:
    """An address that cannot be listened on is refused by name."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            TelemetryError, match=f"--metrics-listen: cannot listen on {listen}: Address already in use"
        ):
            async with open_telemetry(listen, None, model="m"):
                raise AssertionError
    with pytest.raises(TelemetryError, match=r"--metrics-listen: cannot listen on no\.such\.host\.invalid:0: "):
        async with open_telemetry("no.such.host.invalid:0", None, model="m"):
            raise AssertionError


async def test_port_speaks_ipv6() -> None:
    """[::1] is listened on like any other address."""
    async with AsyncExitStack() as stack:
        address = stack.enter_context(metrics_server(CollectorRegistry(), "[::1]:0"))
        assert re.fullmatch(r"\[::1\]:\d+", address)
        assert await scrape(address) == ""


async def test_silent_peers_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who connects and says nothing hinders no scrape, and is cut off."""
    monkeypatch.setattr("llama2_server.telemetry.metrics_server._Handler.timeout", 0.2)
    with metrics_server(Metrics(CollectorRegistry()).registry, "127.0.0.1:0") as address:
        reader, writer = await asyncio.open_connection(*address.split(":"))
        assert "llama2_neurons_total 0.0" in await scrape(address)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


async def test_hanging_event_loop_costs_the_readiness_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape that the event loop does not answer shows all other metrics, and no readiness: no call is served."""
    metrics = Metrics(CollectorRegistry())
    metrics.registry.register(ReadinessCollector(HealthServicer(())))
    metrics.registry.register(RequestQueue(1, max_queue_size=1, queue_timeout_seconds=1.0))
    metrics.on_step("decode", 0.02, 1)
    with metrics_server(metrics.registry, "127.0.0.1:0") as address:
        assert sample(await scrape(address), "llama2_ready") == 0
        monkeypatch.setattr(health_module, "LOOP_TIMEOUT_SECONDS", 0.01)
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:  # it blocks this very loop
            text = answer.read().decode()
    assert "\nllama2_ready" not in text
    assert sample(text, "llama2_max_concurrent_requests") == 1
    assert sample(text, 'llama2_engine_step_duration_seconds_count{phase="decode"}') == 1


def test_nothing_is_on_the_global_registry() -> None:
    """Two services in one process do not share metrics: each has its registry."""
    first, second = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    first.unknown_method()
    assert (
        second.registry.get_sample_value("llama2_requests_total", {"method": "unknown", "code": "UNIMPLEMENTED"})
        is None
    )
