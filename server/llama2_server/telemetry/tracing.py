"""OpenTelemetry spans: one per call, with a child per phase; names follow OpenTelemetry's conventions.

Spans contain a call's attributes, which are numbers and names, never text of a request or a reply. This module needs
the `otel` extra, and is imported only if traces are enabled.
"""

import threading
from collections.abc import Mapping
from typing import ClassVar

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider as SdkTracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, TracerProvider, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from llama2_server.telemetry.call import Attribute, Call, Metadata

# By the conventions for gRPC's server spans, the other codes are errors of the client, not of the server.
ERROR_CODES = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
W3C_FIELDS = ("traceparent", "tracestate")


class CallTracer:
    """Spans of calls, from an injected provider; the children are created when the call has completed."""

    _propagator: ClassVar = TraceContextTextMapPropagator()

    def __init__(self, provider: TracerProvider, *, model: str, version: str) -> None:
        self._tracer = provider.get_tracer("llama2_server", version)
        self._model = model
        self._spans: dict[Call, Span] = {}

    def call_started(self, call: Call, metadata: Metadata) -> None:
        """Start the call's span, in the client's trace if the metadata names one."""
        carrier = {key: value for key, value in metadata if key in W3C_FIELDS and isinstance(value, str)}
        context = self._propagator.extract(carrier, Context())
        attributes: dict[str, Attribute] = {"rpc.system.name": "grpc", "rpc.method": call.method}
        span = self._tracer.start_span(call.method, context, SpanKind.SERVER, attributes, start_time=call.started_at_ns)
        identity = span.get_span_context()
        call.trace_id, call.span_id = f"{identity.trace_id:032x}", f"{identity.span_id:016x}"
        self._spans[call] = span

    def call_completed(self, call: Call) -> None:
        """End the call's span at the time of its status, and add the children."""
        span = self._spans.pop(call, None)
        if span is None:  # its start failed
            return
        parent = set_span_in_context(span, Context())
        for phase in call.phases():
            child = self._tracer.start_span(phase.name, parent, start_time=_nanoseconds(call, phase.started_at))
            child.end(_nanoseconds(call, phase.finished_at))
        span.set_attributes(self._attributes(call))
        if call.finish_reason is not None:
            span.set_attribute("gen_ai.response.finish_reasons", [call.finish_reason])
        if call.code in ERROR_CODES:
            span.set_status(StatusCode.ERROR)
            span.set_attribute("error.type", call.code)
        span.end(_nanoseconds(call, call.finished_at))

    def _attributes(self, call: Call) -> Mapping[str, Attribute]:
        attributes: dict[str, Attribute] = {"rpc.response.status_code": call.code, "llama2.request_id": call.request_id}
        if call.account_id is not None:
            attributes["llama2.account_id"] = call.account_id
        if call.error is not None:
            attributes["llama2.error_reason"] = call.error.reason
        if call.request:
            attributes |= {
                "gen_ai.operation.name": "text_completion",
                "gen_ai.provider.name": "llama2-grpc",
                "gen_ai.output.type": "text",
                "gen_ai.request.model": self._model,
                **call.request,
            }
        if call.usage is not None:
            attributes |= {
                "gen_ai.response.id": call.request_id,
                "gen_ai.response.model": self._model,
                "gen_ai.usage.input_tokens": call.usage.tokens.input_tokens,
                "gen_ai.usage.output_tokens": call.usage.tokens.output_tokens,
                "llama2.neurons": float(call.usage.neurons),
                "llama2.cached": call.usage.cached,
            }
        return attributes


class OtlpSpans:
    """A sender of spans to an OTLP receiver over gRPC, in batches and on a dedicated thread.

    OpenTelemetry's environment variables set everything else: OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES,
    OTEL_EXPORTER_OTLP_HEADERS, OTEL_EXPORTER_OTLP_CERTIFICATE and so on.
    """

    def __init__(self, endpoint: str, *, version: str) -> None:
        default = Resource.create({"service.name": "llama2-grpc", "service.version": version})
        resource = default.merge(OTELResourceDetector().detect())  # the operator's environment takes precedence
        self._exporter = OTLPSpanExporter(endpoint)
        # Otherwise the provider would close a second time at exit.
        self.provider = SdkTracerProvider(resource=resource, shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(self._exporter))

    def close(self, timeout_seconds: float) -> None:
        """Send the remaining spans for up to `timeout_seconds`, and drop the others; blocks."""
        closing = threading.Thread(target=self.provider.shutdown, name="span flush", daemon=True)
        closing.start()
        closing.join(timeout_seconds)
        if closing.is_alive():
            self._exporter.shutdown()


def _nanoseconds(call: Call, at: float) -> int:
    """Convert a time of `time.monotonic` to the wall clock that was read when the call started."""
    return call.started_at_ns + round((at - call.started_at) * 1e9)
