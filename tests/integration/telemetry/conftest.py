"""Telemetry for tests: a private metrics registry, and a span exporter in memory."""

import asyncio
import logging
import re
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from tests.support.service import until

from llama2_server.telemetry.metrics import Metrics
from llama2_server.telemetry.telemetry import Telemetry
from llama2_server.telemetry.tracing import CallTracer


async def scrape(address: str, headers: dict[str, str] | None = None) -> str:
    """Return the text of a scrape over HTTP."""
    request = urllib.request.Request(f"http://{address}/metrics", headers=headers or {})

    def read() -> str:
        with urllib.request.urlopen(request, timeout=30) as answer:
            text: str = answer.read().decode()
            return text

    return await asyncio.to_thread(read)


def sample(text: str, series: str) -> float:
    """Return the value of a series, which is written as in the text format."""
    found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
    assert found, f"no {series}"
    return float(found[1])


@dataclass(frozen=True)
class Watched:
    """Telemetry of one service, and its results."""

    telemetry: Telemetry
    exporter: InMemorySpanExporter

    def value(self, name: str, **labels: str) -> float | None:
        """Return the value of a sample, or None."""
        return self.telemetry.metrics.registry.get_sample_value(name, labels)

    async def trace(self, *codes: str) -> list[ReadableSpan]:
        """Wait for calls with these status codes, and return all spans by start time."""
        await until(lambda: sorted(codes) == sorted(self._codes()))
        return sorted(self.exporter.get_finished_spans(), key=lambda span: (span.start_time or 0, span.end_time or 0))

    def _codes(self) -> list[str]:
        spans = self.exporter.get_finished_spans()
        return [str(code) for span in spans if (code := (span.attributes or {}).get("rpc.response.status_code"))]


def watched() -> Watched:
    """Create telemetry with metrics and traces."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = CallTracer(provider, model="@test/model", version="1.2.3")
    return Watched(Telemetry(Metrics(CollectorRegistry()), tracer), exporter)


@pytest.fixture(name="watched")
def _watched() -> Watched:
    return watched()


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """Restore the logging configuration after the test."""
    root, package = logging.getLogger(), logging.getLogger("llama2_server")
    before = list(root.handlers), root.level, package.level, threading.excepthook, sys.unraisablehook
    others = {name: logging.getLogger(name).level for name in ("alembic", "asyncio")}
    yield
    root.handlers[:], level, package_level, threading.excepthook, sys.unraisablehook = before
    root.setLevel(level)
    package.setLevel(package_level)
    for name, other in others.items():
        logging.getLogger(name).setLevel(other)
    logging.captureWarnings(False)
