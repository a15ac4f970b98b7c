"""Who hears of every call: metrics, the log and, where it is asked for, the tracer."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Protocol
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry

from llama2_server.telemetry.call import Call, Metadata, Usage
from llama2_server.telemetry.errors import TelemetryError
from llama2_server.telemetry.metrics import Metrics
from llama2_server.telemetry.metrics_server import scraped

logger = logging.getLogger(__name__)
requests = logging.getLogger("llama2_server.requests")

SPAN_FLUSH_SECONDS = 5.0


class Tracer(Protocol):
    """Makes a call's spans; see tracing.py."""

    def call_began(self, call: Call, metadata: Metadata) -> None:
        """Begin the call's span."""

    def call_over(self, call: Call) -> None:
        """End it."""


class Telemetry:
    """Observes calls; one that is not of this API is only counted, and at level debug logged."""

    def __init__(self, metrics: Metrics, tracer: Tracer | None = None) -> None:
        self.metrics = metrics
        self._tracer = tracer

    def call_began(self, call: Call, metadata: Metadata) -> None:
        """See Observer."""
        if self._tracer is not None and call.ours:
            self._tracer.call_began(call, metadata)

    def call_ended(self, call: Call) -> None:
        """See Observer."""
        self.metrics.call_ended(call)

    def usage_recorded(self, call: Call, usage: Usage) -> None:
        """See Observer."""
        self.metrics.usage_recorded(call, usage)

    def call_over(self, call: Call) -> None:
        """See Observer."""
        level = logging.INFO if call.ours else logging.DEBUG
        if requests.isEnabledFor(level):
            requests.log(level, "request", extra=_line(call))
        if self._tracer is not None and call.ours:
            self._tracer.call_over(call)


def check_endpoint(otlp_endpoint: str | None) -> None:
    """Refuse at once what `opened` would refuse after the weights are loaded.

    Raises:
        TelemetryError: traces cannot be sent there, or not by this installation.
    """
    if otlp_endpoint is None:
        return
    parts = urlsplit(otlp_endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise TelemetryError(
            "otlp_endpoint: must be http://HOST:PORT or https://HOST:PORT, such as http://localhost:4317"
        )
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.exporter.otlp.proto.grpc") is None:
        raise TelemetryError("otlp_endpoint: traces need the otel extra: pip install 'llama2-grpc[otel]'")


@asynccontextmanager
async def opened(metrics_listen: str | None, otlp_endpoint: str | None, *, model: str) -> AsyncIterator[Telemetry]:
    """Telemetry on a registry of its own, as the settings ask for it, and its end: the last thing in a drain.

    Raises:
        TelemetryError: it cannot be had so.
    """
    check_endpoint(otlp_endpoint)
    metrics = Metrics(CollectorRegistry())
    async with AsyncExitStack() as stack:
        if metrics_listen is not None:
            # Both ends of it take a moment: the name is looked up, the thread has to notice.
            port = scraped(metrics.registry, metrics_listen)
            address = await asyncio.to_thread(port.__enter__)
            stack.push_async_callback(asyncio.to_thread, port.__exit__, None, None, None)
            logger.info("metrics at http://%s/metrics", address)
        tracer = None
        if otlp_endpoint is not None:
            from llama2_server.telemetry.tracing import CallTracer, OtlpSpans  # needs an extra

            spans = OtlpSpans(otlp_endpoint, version=version("llama2-grpc"))
            stack.push_async_callback(asyncio.to_thread, spans.close, SPAN_FLUSH_SECONDS)
            tracer = CallTracer(spans.provider, model=model, version=version("llama2-grpc"))
        yield Telemetry(metrics, tracer)


def _line(call: Call) -> dict[str, object]:
    """The facts of a call that are known, by name, for its line in the log."""
    facts: dict[str, object] = {
        "request_id": call.request_id,
        "method": call.method,
        "code": call.code,
        "reason": None if call.error is None else call.error.reason,
        "account": call.account,
        "finish_reason": call.finish_reason,
        "total_seconds": round(call.ended - call.begun, 6),
        "trace_id": call.trace_id,
        "span_id": call.span_id,
    }
    if call.usage is not None:
        facts |= {
            "cached": call.usage.cached,
            "input_tokens": call.usage.input_tokens,
            "output_tokens": call.usage.output_tokens,
            "neurons": f"{call.usage.neurons:f}",
        }
    for phase in call.all_phases():
        name = "queue_time" if phase.name == "wait" else phase.name
        facts[f"{name}_seconds"] = round(phase.ended - phase.begun, 6)
    return {name: fact for name, fact in facts.items() if fact is not None}
