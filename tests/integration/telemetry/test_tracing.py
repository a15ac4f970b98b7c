"""Traces as an OpenTelemetry backend receives them: calls over a real socket, spans in memory."""

from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode
from tests.integration.telemetry.conftest import Watched
from tests.support.deadlines import DEADLINE_SECONDS, LoopClock, server_deadline
from tests.support.service import (
    ServiceMaker,
    disconnect,
    health_stub,
    hold_slot,
    reflection_stub,
    remaining_text,
    with_config,
)

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard, RequestsPerMinute

REPLY = "Once upon a time, a fox lived by the sea."
SERVICE = "llama2.v1.TextGenerationService"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


def root_of(spans: list[ReadableSpan]) -> ReadableSpan:
    """Return the only server span."""
    (root,) = (span for span in spans if span.kind is SpanKind.SERVER)
    return root


def children_of(root: ReadableSpan, spans: list[ReadableSpan]) -> list[ReadableSpan]:
    return [span for span in spans if span.parent is not None and span.parent.span_id == root.context.span_id]


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


async def rejected(call: Callable[[], Any], code: grpc.StatusCode) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call()
    assert error.value.code() is code


@pytest.fixture
def caching_card(demo_card: ModelCard) -> ModelCard:
    return with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=10**6))


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_call_is_one_span_with_its_phases(serve_scripted: ServiceMaker, watched: Watched, method: str) -> None:
    """A call has one server span with the conventions' attributes, and one child span per phase."""
    request = pb.GenerateRequest(prompt="a story", max_tokens=50, temperature=0.5, seed=7)
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        if method == "Generate":
            completion = (await service.text.Generate(request)).completion
        else:
            completion = [part async for part in service.text.GenerateStream(request)][-1].completion
        spans = await watched.trace("OK")
    root = root_of(spans)
    assert root.name == f"{SERVICE}/{method}"
    assert root.parent is None
    assert root.status.status_code is StatusCode.UNSET
    assert attributes(root) == {
        "rpc.system.name": "grpc",
        "rpc.method": f"{SERVICE}/{method}",
        "rpc.response.status_code": "OK",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "llama2-grpc",
        "gen_ai.output.type": "text",
        "gen_ai.request.model": "@test/model",
        "gen_ai.request.stream": method == "GenerateStream",
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.response.id": completion.request_id,
        "gen_ai.response.model": "@test/model",
        "gen_ai.response.finish_reasons": ("END_OF_SEQUENCE",),
        "gen_ai.usage.input_tokens": completion.usage.input_tokens,
        "gen_ai.usage.output_tokens": completion.usage.output_tokens,
        "llama2.neurons": float(completion.usage.neurons),
        "llama2.cached": False,
        "llama2.account_id": "anonymous",
        "llama2.request_id": completion.request_id,
    }
    children = children_of(root, spans)
    assert [child.name for child in children] == ["validation", "queue", "prefill", "decode"]
    assert len(spans) == 5
    times = [time for child in children for time in (child.start_time or 0, child.end_time or 0)]
    assert times == sorted(times)
    assert (root.start_time or 0) <= times[0]
    assert children[2].end_time == children[3].start_time


async def test_invalid_call_is_not_a_server_error(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A rejected request has its status code and the time of its validation; by the conventions it is not an error."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        request = pb.GenerateRequest(prompt="x", top_p=2)
        await rejected(lambda: service.text.Generate(request), grpc.StatusCode.INVALID_ARGUMENT)
        spans = await watched.trace("INVALID_ARGUMENT")
    root = root_of(spans)
    assert root.status.status_code is StatusCode.UNSET
    assert attributes(root)["llama2.error_reason"] == "INVALID_REQUEST"
    assert not [name for name in attributes(root) if name.startswith(("gen_ai.", "error."))]
    assert [child.name for child in children_of(root, spans)] == ["validation"]


async def test_malformed_bytes_have_a_span(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A request that is not a valid message has a span like any other call."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        garbage: Any = service.channel.unary_unary(f"/{SERVICE}/Generate")
        await rejected(lambda: garbage(b"\xff\xff"), grpc.StatusCode.INVALID_ARGUMENT)
        (root,) = await watched.trace("INVALID_ARGUMENT")
    assert root.name == f"{SERVICE}/Generate"


async def test_quota_rejection_names_its_reason(
    serve_scripted: ServiceMaker, demo_card: ModelCard, watched: Watched
) -> None:
    """A rejection by the quota has its reason, no queue time, and is not a server error."""
    card = with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=1))
    async with serve_scripted(REPLY, card=card, telemetry=watched.telemetry) as service:
        request = pb.GenerateRequest(prompt="x")
        await service.text.Generate(request)
        await watched.trace("OK")
        watched.exporter.clear()
        await rejected(lambda: service.text.Generate(request), grpc.StatusCode.RESOURCE_EXHAUSTED)
        spans = await watched.trace("RESOURCE_EXHAUSTED")
    root = root_of(spans)
    assert (root.status.status_code, attributes(root)["llama2.error_reason"]) == (StatusCode.UNSET, "QUOTA_EXCEEDED")
    assert attributes(root)["gen_ai.request.model"] == "@test/model"
    assert [child.name for child in children_of(root, spans)] == ["validation"]


async def test_cancelled_call_has_its_status_and_tokens(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A call whose client disconnects is CANCELLED, not an error, and has the tokens computed by then."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        await disconnect(service, await hold_slot(service))
        service.model.open_gate()
        spans = await watched.trace("CANCELLED")
    root = root_of(spans)
    assert root.status.status_code is StatusCode.UNSET
    assert attributes(root)["gen_ai.usage.output_tokens"] == 2
    assert "gen_ai.response.finish_reasons" not in attributes(root)
    assert [child.name for child in children_of(root, spans)] == ["validation", "queue", "prefill", "decode"]


async def test_expired_call_is_an_error(serve_scripted: ServiceMaker, watched: Watched, clock: LoopClock) -> None:
    """A call whose deadline passes in the queue has only queue time; by the conventions it is an error."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        holder = await hold_slot(service)
        request = pb.GenerateRequest(prompt="x")
        call = service.text.Generate(request, metadata=server_deadline())
        await service.wait_until_queued(1)
        clock.advance(DEADLINE_SECONDS)
        await rejected(lambda: call, grpc.StatusCode.DEADLINE_EXCEEDED)
        spans = await watched.trace("DEADLINE_EXCEEDED")
        service.model.open_gate()
        await remaining_text(holder)
    root = root_of(spans)
    assert root.status.status_code is StatusCode.ERROR
    assert attributes(root)["error.type"] == "DEADLINE_EXCEEDED"
    assert attributes(root)["gen_ai.usage.output_tokens"] == 0
    assert [child.name for child in children_of(root, spans)] == ["validation", "queue"]


async def test_engine_error_has_no_exception_text(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A call that fails in the engine is INTERNAL and an error; the span has nothing of the exception."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        service.model.failure = RuntimeError("a prompt, perhaps")
        request = pb.GenerateRequest(prompt="x")
        await rejected(lambda: service.text.Generate(request), grpc.StatusCode.INTERNAL)
        spans = await watched.trace("INTERNAL")
    root = root_of(spans)
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, None)
    assert attributes(root)["error.type"] == "INTERNAL"
    assert not any(span.events for span in spans)
    assert [child.name for child in children_of(root, spans)] == ["validation", "queue", "prefill"]


async def test_cached_reply_has_no_queue_time(
    serve_scripted: ServiceMaker, caching_card: ModelCard, watched: Watched
) -> None:
    """A cached reply is marked as cached, has its tokens, no neurons and no queue time."""
    async with serve_scripted(REPLY, card=caching_card, telemetry=watched.telemetry) as service:
        await service.text.Generate(pb.GenerateRequest(prompt="x"))
        await watched.trace("OK")
        watched.exporter.clear()
        reply = await service.text.Generate(pb.GenerateRequest(prompt="x"))
        spans = await watched.trace("OK")
    root = root_of(spans)
    assert (attributes(root)["llama2.cached"], attributes(root)["llama2.neurons"]) == (True, 0.0)
    assert attributes(root)["gen_ai.usage.output_tokens"] == reply.completion.usage.output_tokens
    assert attributes(root)["gen_ai.response.finish_reasons"] == ("END_OF_SEQUENCE",)
    assert [child.name for child in children_of(root, spans)] == ["validation"]


async def test_shared_generation_is_in_both_traces(
    serve_scripted: ServiceMaker, caching_card: ModelCard, watched: Watched
) -> None:
    """Two calls that share a generation have one span each; the later one shows the remaining part."""
    async with serve_scripted(REPLY, card=caching_card, telemetry=watched.telemetry) as service:
        leader = await hold_slot(service, "same")
        follower = service.text.GenerateStream(pb.GenerateRequest(prompt="same"))
        assert isinstance(await follower.read(), pb.GenerateStreamResponse)
        service.model.open_gate()
        await remaining_text(leader)
        await remaining_text(follower)
        spans = await watched.trace("OK", "OK")
    first, second = (span for span in spans if span.kind is SpanKind.SERVER)
    assert first.context.trace_id != second.context.trace_id
    assert [attributes(root)["llama2.cached"] for root in (first, second)] == [False, True]
    names = [[child.name for child in children_of(root, spans)] for root in (first, second)]
    assert names == [["validation", "queue", "prefill", "decode"], ["validation", "decode"]]
    decode = children_of(second, spans)[-1]
    assert (decode.start_time or 0) >= (second.start_time or 0)


async def test_span_joins_the_clients_trace(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A W3C traceparent in the metadata makes the span a child of the client's span."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "vendor=1"))
        await service.text.Generate(pb.GenerateRequest(prompt="x"), metadata=metadata)
        spans = await watched.trace("OK")
    root = root_of(spans)
    assert root.parent is not None
    assert (f"{root.parent.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, PARENT)
    assert root.context.trace_state.get("vendor") == "1"
    assert {f"{span.context.trace_id:032x}" for span in spans} == {TRACE}


async def test_clients_sampling_decision_is_kept(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A call of an unsampled trace has no spans; the next call has."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        metadata = (("traceparent", f"00-{TRACE}-{PARENT}-00"),)
        await service.text.Generate(pb.GenerateRequest(prompt="x"), metadata=metadata)
        await service.text.Generate(pb.GenerateRequest(prompt="y"))
        spans = await watched.trace("OK")
    assert root_of(spans).parent is None


@pytest.mark.parametrize("traceparent", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", "x" * 5000])
async def test_invalid_trace_context_starts_a_new_trace(
    serve_scripted: ServiceMaker, watched: Watched, traceparent: str
) -> None:
    """An invalid trace context in the metadata is ignored."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        await service.text.Generate(pb.GenerateRequest(prompt="x"), metadata=(("traceparent", traceparent),))
        assert root_of(await watched.trace("OK")).parent is None


async def test_probes_and_reflection_have_no_spans(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """Health checks and reflection have no spans; every method of the public API has."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        await health_stub(service.channel).Check(health_pb2.HealthCheckRequest())
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        assert [answer async for answer in reflection_stub(service.channel).ServerReflectionInfo(iter([ask]))]
        await service.text.CountTokens(pb.CountTokensRequest(prompt="x"))
        (root,) = await watched.trace("OK")
    assert root.name == f"{SERVICE}/CountTokens"
    assert attributes(root)["llama2.account_id"] == "anonymous"
