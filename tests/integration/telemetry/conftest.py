"""Telemetry whose every word the tests can read: a registry and a span exporter of their own."""

import logging
import sys
import threading
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


@dataclass(frozen=True)
class Watched:
    """Telemetry for one service, and what it has gathered."""

    telemetry: Telemetry
    exporter: InMemorySpanExporter

    def value(self, name: str, **labels: str) -> float | None:
        """A sample's value; None if there is none."""
        return self.telemetry.metrics.registry.get_sample_value(name, labels)

    async def trace(self, *codes: str) -> list[ReadableSpan]:
        """The spans of all calls so far, in the order in which they began, once these calls' statuses are there."""
        await until(lambda: sorted(codes) == sorted(self._codes()))
        return sorted(self.exporter.get_finished_spans(), key=lambda span: (span.start_time or 0, span.end_time or 0))

    def _codes(self) -> list[str]:
        spans = self.exporter.get_finished_spans()
        return [str(code) for span in spans if (code := (span.attributes or {}).get("rpc.response.status_code"))]


def watched() -> Watched:
    """Telemetry with metrics and traces."""
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
    """Lets a test configure logging, and undoes it."""
    root, ours = logging.getLogger(), logging.getLogger("llama2_server")
    before = list(root.handlers), root.level, ours.level, threading.excepthook, sys.unraisablehook
    others = {name: logging.getLogger(name).level for name in ("alembic", "asyncio")}
    yield
    root.handlers[:], level, our_level, threading.excepthook, sys.unraisablehook = before
    root.setLevel(level)
    ours.setLevel(our_level)
    for name, other in others.items():
        logging.getLogger(name).setLevel(other)
    logging.captureWarnings(False)
