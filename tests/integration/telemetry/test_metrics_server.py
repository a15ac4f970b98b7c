"""The HTTP server for Prometheus: addresses, silent clients and a hanging event loop."""

import asyncio
import re
import socket
import threading
import urllib.request

import pytest
from prometheus_client import CollectorRegistry
from tests.integration.telemetry.conftest import sample, scrape

from llama2_server.admission.request_queue import RequestQueue
from llama2_server.api import health as health_module
from llama2_server.api.health import HealthServicer, ReadinessCollector
from llama2_server.engine.steps.report import StepPhase, StepReport
from llama2_server.telemetry.errors import TelemetryError
from llama2_server.telemetry.metrics import Metrics
from llama2_server.telemetry.metrics_server import MAX_THREADS, metrics_server
from llama2_server.telemetry.telemetry import open_telemetry


async def test_unusable_address_is_one_line() -> None:
    """An address that cannot be listened on is rejected with one line that names it."""
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


@pytest.mark.parametrize("host", ["[::1]", "[::]", "127.0.0.1"])
async def test_server_listens_on_ipv4_and_ipv6(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """Addresses of both families work, without a DNS lookup of their names."""

    def look_up(*_: object) -> str:
        raise AssertionError

    monkeypatch.setattr(socket, "getfqdn", look_up)
    with metrics_server(CollectorRegistry(), f"{host}:0") as address:
        assert re.fullmatch(rf"{re.escape(host)}:\d+", address)
        assert await scrape(address) == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])  # noqa: S104 - of a test
async def test_all_addresses_include_ipv4_and_ipv6(host: str) -> None:
    """Prometheus can scrape pods of IPv4-only, IPv6-only and dual-stack clusters with one setting."""
    with metrics_server(CollectorRegistry(), f"{host}:0") as address:
        port = address.rpartition(":")[2]
        assert await scrape(f"127.0.0.1:{port}") == ""
        assert await scrape(f"[::1]:{port}") == ""


async def test_all_addresses_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without IPv6 the server listens on IPv4."""
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with metrics_server(CollectorRegistry(), "[::]:0") as address:
        assert await scrape(f"127.0.0.1:{address.rpartition(':')[2]}") == ""


async def test_slow_clients_use_few_threads() -> None:
    """Clients that send nothing occupy MAX_THREADS threads at most; a scrape closes the oldest one."""
    before = threading.active_count()
    with metrics_server(Metrics(CollectorRegistry()).registry, "127.0.0.1:0") as address:
        silent = [await asyncio.open_connection(*address.split(":")) for _ in range(3 * MAX_THREADS)]
        assert "llama2_neurons_total 0.0" in await scrape(address)
        for reader, _ in silent[: 2 * MAX_THREADS]:
            assert await reader.read() == b""
        assert threading.active_count() <= before + MAX_THREADS + 3  # the server, and the scrape of this test
        for _, writer in silent:
            writer.close()


async def test_silent_clients_are_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends nothing does not block scrapes, and is disconnected after a timeout."""
    with metrics_server(Metrics(CollectorRegistry()).registry, "127.0.0.1:0") as address:
        _, patient = await asyncio.open_connection(*address.split(":"))
        assert "llama2_neurons_total 0.0" in await scrape(address)
        # A scrape could be slower than this timeout.
        monkeypatch.setattr("llama2_server.telemetry.metrics_server._Handler.timeout", 0.2)
        reader, writer = await asyncio.open_connection(*address.split(":"))
        assert await asyncio.wait_for(reader.read(), 60) == b""
        writer.close()
        patient.close()


async def test_scrape_works_while_the_event_loop_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape while the event loop hangs has every metric but the readiness, because no call is served then."""
    metrics = Metrics(CollectorRegistry())
    metrics.registry.register(ReadinessCollector(HealthServicer(())))
    metrics.registry.register(RequestQueue(1, max_queue_size=1, queue_timeout_seconds=1.0))
    metrics.on_step(StepReport(StepPhase.DECODE, 0.02, rows=6, proposed=5, accepted=3))
    monkeypatch.setattr(health_module, "LOOP_TIMEOUT_SECONDS", 60)
    with metrics_server(metrics.registry, "127.0.0.1:0") as address:
        assert sample(await scrape(address), "llama2_ready") == 0
        monkeypatch.setattr(health_module, "LOOP_TIMEOUT_SECONDS", 0.01)
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:  # blocks this event loop
            text = answer.read().decode()
    assert "\nllama2_ready" not in text
    assert sample(text, "llama2_max_concurrent_requests") == 1
    assert sample(text, 'llama2_engine_step_duration_seconds_count{phase="decode"}') == 1
