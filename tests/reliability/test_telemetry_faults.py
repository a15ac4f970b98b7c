"""Telemetry that fails: the log has it, and the replies, the records and the readiness stay the same."""

import logging
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import prometheus_client
import pytest
from grpc_health.v1 import health_pb2
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry
from tests.integration.usage.conftest import stored
from tests.support.faults import FaultPoint
from tests.support.service import ServiceMaker, details, health_stub, remaining_text

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.telemetry import guard, telemetry, tracing
from llama2_server.telemetry.call import Call
from llama2_server.telemetry.metrics import Metrics
from llama2_server.telemetry.telemetry import Telemetry

REPLY = "Once upon a time."

FAULT_POINTS: dict[str, tuple[Any, str]] = {
    "the call's start": (Telemetry, "call_started"),
    "the call's status": (Telemetry, "call_finished"),
    "the usage record": (Telemetry, "usage_recorded"),
    "the call's end": (Telemetry, "call_completed"),
    "the log's fields": (telemetry, "_log_fields"),
    "the span's start": (tracing.CallTracer, "call_started"),
    "the span's end": (tracing.CallTracer, "call_completed"),
    "the phases": (Call, "phases"),
    "counters": (prometheus_client.Counter, "inc"),
    "histograms": (prometheus_client.Histogram, "observe"),
    "a series": (prometheus_client.Counter, "labels"),
    "unknown methods": (Metrics, "unknown_method"),
}


@pytest.mark.parametrize("name", FAULT_POINTS)
async def test_a_failure_of_telemetry_changes_no_reply(
    serve_scripted: ServiceMaker,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    name: str,
) -> None:
    """Complete replies, rejections and unknown methods have the same status and content; each record is written."""
    caplog.set_level(logging.INFO)  # request records are written only at this level
    monkeypatch.setattr(guard, "_logged_at", {})
    tracer = tracing.CallTracer(TracerProvider(), model="test", version="1")
    fault = FaultPoint(monkeypatch, *FAULT_POINTS[name])
    async with serve_scripted(REPLY, telemetry=Telemetry(Metrics(CollectorRegistry()), tracer)) as service:
        fault.arm(10**6)
        for _ in range(2):
            reply = await service.text.Generate(pb.GenerateRequest(prompt="a story"))
            assert (reply.response, reply.completion.finish_reason) == (REPLY, pb.FINISH_REASON_END_OF_SEQUENCE)
        assert await remaining_text(service.text.GenerateStream(pb.GenerateRequest(prompt="a story"))) == REPLY
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await service.text.Generate(pb.GenerateRequest())
        assert rejected.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "BadRequest" in details(rejected.value)
        unknown_method: Any = service.channel.unary_unary("/llama2.v1.TextGenerationService/Unknown")
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await unknown_method(b"")
        assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
        health = await health_stub(service.channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        assert fault.raised
        fault.disarm()
    records = await stored(f"sqlite:///{tmp_path / 'usage.db'}")
    assert [record.outcome for record in records] == ["END_OF_SEQUENCE"] * 3
    logged = [record for record in caplog.records if record.name == guard.__name__]
    assert 1 <= len(logged) <= 4
    assert all(record.levelno == logging.ERROR for record in logged)
