"""Report calls to metrics, the request log and, if enabled, traces."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Protocol
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry

from llama2_server.telemetry.call import Call, Metadata, RecordedUsage
from llama2_server.telemetry.errors import TelemetryError
from llama2_server.telemetry.metrics import Metrics
from llama2_server.telemetry.metrics_server import metrics_server

logger = logging.getLogger(__name__)
request_logger = logging.getLogger("llama2_server.requests")

SPAN_FLUSH_SECONDS = 5.0


class Tracer(Protocol):
    """Spans of calls; tracing.py has the implementation, which needs the `otel` extra."""

    def call_started(self, call: Call, metadata: Metadata) -> None:
        """Start the call's span."""

    def call_completed(self, call: Call) -> None:
        """End the call's span."""


class Telemetry:
    """The observer of all calls; a call outside the public API is only counted, and logged at level debug."""

    def __init__(self, metrics: Metrics, tracer: Tracer | None = None) -> None:
        self.metrics = metrics
        self._tracer = tracer

    def call_started(self, call: Call, metadata: Metadata) -> None:
        """Start the call's span."""
        if self._tracer is not None and call.is_public_api:
            self._tracer.call_started(call, metadata)

    def call_finished(self, call: Call) -> None:
        """Count the call."""
        self.metrics.call_finished(call)

    def usage_recorded(self, call: Call, usage: RecordedUsage) -> None:
        """Count the call's tokens and neurons."""
        self.metrics.usage_recorded(call, usage)

    def call_completed(self, call: Call) -> None:
        """Log the call and end its span."""
        level = logging.INFO if call.is_public_api else logging.DEBUG
        if request_logger.isEnabledFor(level):
            request_logger.log(level, "request", extra=_log_fields(call))
        if self._tracer is not None and call.is_public_api:
            self._tracer.call_completed(call)


def check_endpoint(otlp_endpoint: str | None) -> None:
    """Check the setting before the weights load, so that `open_telemetry` does not fail after that.

    Raises:
        TelemetryError: the endpoint is not valid, or the `otel` extra is not installed.
    """
    if otlp_endpoint is None:
        return
    parts = urlsplit(otlp_endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise TelemetryError(
            f"--otlp-endpoint: {otlp_endpoint} is not a valid endpoint; "
            "use http://HOST:PORT or https://HOST:PORT, such as http://localhost:4317"
        )
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.exporter.otlp.proto.grpc") is None:
        raise TelemetryError("--otlp-endpoint: traces need the otel extra; run pip install '.[otel]' in the clone")


@asynccontextmanager
async def open_telemetry(
    metrics_listen: str | None, otlp_endpoint: str | None, *, model: str
) -> AsyncIterator[Telemetry]:
    """Open telemetry on a new registry, as set, for the body of the `async with`; a drain closes it last.

    Raises:
        TelemetryError: the settings do not work.
    """
    check_endpoint(otlp_endpoint)
    metrics = Metrics(CollectorRegistry())
    async with AsyncExitStack() as stack:
        if metrics_listen is not None:
            # Entering resolves the host name and leaving joins a thread; both would block the event loop.
            server = metrics_server(metrics.registry, metrics_listen)
            address = await asyncio.to_thread(server.__enter__)
            stack.push_async_callback(asyncio.to_thread, server.__exit__, None, None, None)
            logger.info("metrics are served at http://%s/metrics", address)
        tracer = None
        if otlp_endpoint is not None:
            from llama2_server.telemetry.tracing import CallTracer, OtlpSpans  # needs an extra

            spans = OtlpSpans(otlp_endpoint, version=version("llama2-grpc"))
            stack.push_async_callback(asyncio.to_thread, spans.close, SPAN_FLUSH_SECONDS)
            tracer = CallTracer(spans.provider, model=model, version=version("llama2-grpc"))
        yield Telemetry(metrics, tracer)


def _log_fields(call: Call) -> dict[str, object]:
    """Return the fields of the call's log record; an attribute without a value is left out."""
    fields: dict[str, object] = {
        "request_id": call.request_id,
        "method": call.method,
        "code": call.code,
        "reason": None if call.error is None else call.error.reason,
        "account_id": call.account_id,
        "finish_reason": call.finish_reason,
        "total_seconds": round(call.finished_at - call.started_at, 6),
        "trace_id": call.trace_id,
        "span_id": call.span_id,
    }
    if call.usage is not None:
        fields |= {
            "cached": call.usage.cached,
            "input_tokens": call.usage.tokens.input_tokens,
            "output_tokens": call.usage.tokens.output_tokens,
            "neurons": f"{call.usage.neurons:f}",
        }
    for phase in call.phases():
        name = "queue_time" if phase.name == "queue" else phase.name
        fields[f"{name}_seconds"] = round(phase.finished_at - phase.started_at, 6)
    return {name: value for name, value in fields.items() if value is not None}
