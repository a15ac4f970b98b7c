"""Traces as an OpenTelemetry backend would get them: calls over a real socket, spans in memory."""

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
from tests.support.service import (
    ServiceMaker,
    hang_up,
    health_stub,
    hold_the_slot,
    reflection_stub,
    server_deadline,
    text_of,
    with_config,
)

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard, RequestsPerMinute

REPLY = "Once upon a time, a fox lived by the sea."
SERVICE = "llama2.v1.TextGenerationService"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


def root_of(spans: list[ReadableSpan]) -> ReadableSpan:
    """The only span of a call."""
    (root,) = (span for span in spans if span.kind is SpanKind.SERVER)
    return root


def children_of(root: ReadableSpan, spans: list[ReadableSpan]) -> list[ReadableSpan]:
    return [span for span in spans if span.parent is not None and span.parent.span_id == root.context.span_id]


def facts(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


async def refused(call: Callable[[], Any], code: grpc.StatusCode) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call()
    assert error.value.code() is code


@pytest.fixture
def caching_card(demo_card: ModelCard) -> ModelCard:
    return with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=10**6))


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_call_is_one_span_with_its_phases(serve_scripted: ServiceMaker, watched: Watched, method: str) -> None:
    """A call has one server span with the conventions' attributes, and children that tell where its time went."""
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
    assert facts(root) == {
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
    moments = [moment for child in children for moment in (child.start_time or 0, child.end_time or 0)]
    assert moments == sorted(moments)
    assert (root.start_time or 0) <= moments[0]
    assert children[2].end_time == children[3].start_time


async def test_invalid_call_is_no_error_of_the_server(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A refused request has its status code and the time of its validation; by the conventions it is no error."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        request = pb.GenerateRequest(prompt="x", top_p=2)
        await refused(lambda: service.text.Generate(request), grpc.StatusCode.INVALID_ARGUMENT)
        spans = await watched.trace("INVALID_ARGUMENT")
    root = root_of(spans)
    assert root.status.status_code is StatusCode.UNSET
    assert facts(root)["llama2.error_reason"] == "INVALID_REQUEST"
    assert not [name for name in facts(root) if name.startswith(("gen_ai.", "error."))]
    assert [child.name for child in children_of(root, spans)] == ["validation"]


async def test_malformed_bytes_have_a_span(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """What is no message at all is a call like any other."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        garbage: Any = service.channel.unary_unary(f"/{SERVICE}/Generate")
        await refused(lambda: garbage(b"\xff\xff"), grpc.StatusCode.INVALID_ARGUMENT)
        (root,) = await watched.trace("INVALID_ARGUMENT")
    assert root.name == f"{SERVICE}/Generate"


async def test_quota_refusal_says_so(serve_scripted: ServiceMaker, demo_card: ModelCard, watched: Watched) -> None:
    """A refusal by the quota names its reason, waits for nothing, and is no error of the server."""
    card = with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=1))
    async with serve_scripted(REPLY, card=card, telemetry=watched.telemetry) as service:
        request = pb.GenerateRequest(prompt="x")
        await service.text.Generate(request)
        await watched.trace("OK")
        watched.exporter.clear()
        await refused(lambda: service.text.Generate(request), grpc.StatusCode.RESOURCE_EXHAUSTED)
        spans = await watched.trace("RESOURCE_EXHAUSTED")
    root = root_of(spans)
    assert (root.status.status_code, facts(root)["llama2.error_reason"]) == (StatusCode.UNSET, "QUOTA_EXCEEDED")
    assert facts(root)["gen_ai.request.model"] == "@test/model"
    assert [child.name for child in children_of(root, spans)] == ["validation"]


async def test_cancelled_call_has_its_status_and_what_was_computed(
    serve_scripted: ServiceMaker, watched: Watched
) -> None:
    """A call whose client hangs up is CANCELLED, no error, and tells the tokens that it had cost by then."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        await hang_up(service, await hold_the_slot(service))
        service.model.open_gate()
        spans = await watched.trace("CANCELLED")
    root = root_of(spans)
    assert root.status.status_code is StatusCode.UNSET
    assert facts(root)["gen_ai.usage.output_tokens"] == 2
    assert "gen_ai.response.finish_reasons" not in facts(root)
    assert [child.name for child in children_of(root, spans)] == ["validation", "queue", "prefill", "decode"]


async def test_expired_call_is_an_error(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A call whose deadline passes in line has waited, and nothing else; the conventions call that an error."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        holder = await hold_the_slot(service)
        request = pb.GenerateRequest(prompt="x")
        deadline = server_deadline(200)
        await refused(lambda: service.text.Generate(request, metadata=deadline), grpc.StatusCode.DEADLINE_EXCEEDED)
        spans = await watched.trace("DEADLINE_EXCEEDED")
        service.model.open_gate()
        await text_of(holder)
    root = root_of(spans)
    assert root.status.status_code is StatusCode.ERROR
    assert facts(root)["error.type"] == "DEADLINE_EXCEEDED"
    assert facts(root)["gen_ai.usage.output_tokens"] == 0
    assert [child.name for child in children_of(root, spans)] == ["validation", "queue"]


async def test_engine_fault_is_an_error_without_its_text(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A call that the engine fails is INTERNAL and an error; nothing of the exception is in the span."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        service.model.failure = RuntimeError("a prompt, perhaps")
        request = pb.GenerateRequest(prompt="x")
        await refused(lambda: service.text.Generate(request), grpc.StatusCode.INTERNAL)
        spans = await watched.trace("INTERNAL")
    root = root_of(spans)
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, None)
    assert facts(root)["error.type"] == "INTERNAL"
    assert not any(span.events for span in spans)
    assert [child.name for child in children_of(root, spans)] == ["validation", "queue", "prefill"]


async def test_cache_hit_waits_for_nothing(
    serve_scripted: ServiceMaker, caching_card: ModelCard, watched: Watched
) -> None:
    """A reply out of the cache is marked, tells its tokens, costs no neurons, and waits for nothing."""
    async with serve_scripted(REPLY, card=caching_card, telemetry=watched.telemetry) as service:
        await service.text.Generate(pb.GenerateRequest(prompt="x"))
        await watched.trace("OK")
        watched.exporter.clear()
        reply = await service.text.Generate(pb.GenerateRequest(prompt="x"))
        spans = await watched.trace("OK")
    root = root_of(spans)
    assert (facts(root)["llama2.cached"], facts(root)["llama2.neurons"]) == (True, 0.0)
    assert facts(root)["gen_ai.usage.output_tokens"] == reply.completion.usage.output_tokens
    assert facts(root)["gen_ai.response.finish_reasons"] == ("END_OF_SEQUENCE",)
    assert [child.name for child in children_of(root, spans)] == ["validation"]


async def test_shared_generation_is_in_both_traces(
    serve_scripted: ServiceMaker, caching_card: ModelCard, watched: Watched
) -> None:
    """Two calls that share a generation have a span each: the one that joined later shows what was left of it."""
    async with serve_scripted(REPLY, card=caching_card, telemetry=watched.telemetry) as service:
        leader = await hold_the_slot(service, "same")
        follower = service.text.GenerateStream(pb.GenerateRequest(prompt="same"))
        assert isinstance(await follower.read(), pb.GenerateStreamResponse)
        service.model.open_gate()
        await text_of(leader)
        await text_of(follower)
        spans = await watched.trace("OK", "OK")
    first, second = (span for span in spans if span.kind is SpanKind.SERVER)
    assert first.context.trace_id != second.context.trace_id
    assert [facts(root)["llama2.cached"] for root in (first, second)] == [False, True]
    names = [[child.name for child in children_of(root, spans)] for root in (first, second)]
    assert names == [["validation", "queue", "prefill", "decode"], ["validation", "decode"]]
    decode = children_of(second, spans)[-1]
    assert (decode.start_time or 0) >= (second.start_time or 0)


async def test_span_joins_the_callers_trace(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A W3C traceparent in the metadata makes the span a child of the caller's."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "vendor=1"))
        await service.text.Generate(pb.GenerateRequest(prompt="x"), metadata=metadata)
        spans = await watched.trace("OK")
    root = root_of(spans)
    assert root.parent is not None
    assert (f"{root.parent.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, PARENT)
    assert root.context.trace_state.get("vendor") == "1"
    assert {f"{span.context.trace_id:032x}" for span in spans} == {TRACE}


async def test_callers_wish_not_to_be_sampled_is_kept(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """A caller that does not sample its trace gets no spans; the next caller does."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        metadata = (("traceparent", f"00-{TRACE}-{PARENT}-00"),)
        await service.text.Generate(pb.GenerateRequest(prompt="x"), metadata=metadata)
        await service.text.Generate(pb.GenerateRequest(prompt="y"))
        spans = await watched.trace("OK")
    assert root_of(spans).parent is None


@pytest.mark.parametrize("traceparent", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", "x" * 5000])
async def test_broken_trace_context_begins_a_new_trace(
    serve_scripted: ServiceMaker, watched: Watched, traceparent: str
) -> None:
    """Metadata that is no trace context hurts nobody."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        await service.text.Generate(pb.GenerateRequest(prompt="x"), metadata=(("traceparent", traceparent),))
        assert root_of(await watched.trace("OK")).parent is None


async def test_probes_and_reflection_have_no_spans(serve_scripted: ServiceMaker, watched: Watched) -> None:
    """Machines that look whether the server is there do not fill the traces; its own small calls have spans."""
    async with serve_scripted(REPLY, telemetry=watched.telemetry) as service:
        await health_stub(service.channel).Check(health_pb2.HealthCheckRequest())
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        assert [answer async for answer in reflection_stub(service.channel).ServerReflectionInfo(iter([ask]))]
        await service.text.CountTokens(pb.CountTokensRequest(prompt="x"))
        (root,) = await watched.trace("OK")
    assert root.name == f"{SERVICE}/CountTokens"
    assert facts(root)["llama2.account_id"] == "anonymous"
