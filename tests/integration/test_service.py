"""The whole service over a real socket, on a scripted model: every rule that does not depend on a model's wits."""

import asyncio
import time
from decimal import Decimal
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tests.support.service import (
    Service,
    ServiceMaker,
    details,
    disconnect,
    health_stub,
    hold_slot,
    reflection_stub,
    remaining_text,
    server_deadline,
    until,
    with_config,
)

from llama2.v1 import model_pb2
from llama2.v1 import text_generation_pb2 as pb
from llama2_server.admission.accounts import Account, AnonymousAuthenticator, Metadata
from llama2_server.card import ModelCard, RequestsPerMinute
from llama2_server.engine.engine import Engine
from llama2_server.errors import Unauthenticated

REPLY = "Once upon a time, a fox 🦊 lived by the sea."
SMALL_WINDOWS = [("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0)]
METHOD = "/llama2.v1.TextGenerationService/"


async def test_unary_is_the_stream_gathered(serve_scripted: ServiceMaker) -> None:
    """Both RPCs give the same text, byte for byte, and only the stream's last message has a completion."""
    async with serve_scripted(REPLY) as service:
        request = pb.GenerateRequest(prompt="a story", seed=7)
        whole = await service.text.Generate(request)
        parts = [part async for part in service.text.GenerateStream(request)]
        assert whole.response == "".join(part.response for part in parts) == REPLY
        assert [part.HasField("completion") for part in parts] == [False] * (len(parts) - 1) + [True]
        for completion in (whole.completion, parts[-1].completion):
            assert completion.finish_reason == pb.FINISH_REASON_END_OF_SEQUENCE
            assert completion.seed == 7
            assert not completion.cached
        assert whole.completion.usage == parts[-1].completion.usage
        assert whole.completion.request_id != parts[-1].completion.request_id


async def test_tokens_come_as_they_are_computed(serve_scripted: ServiceMaker) -> None:
    """The first delta reaches the caller while the model has not computed the second token."""
    async with serve_scripted(REPLY) as service:
        service.model.gate()
        service.model.allow(1)
        call = service.text.GenerateStream(pb.GenerateRequest(prompt="a story"))
        first = await call.read()
        assert isinstance(first, pb.GenerateStreamResponse)
        assert first.response
        assert REPLY.startswith(first.response)
        service.model.open_gate()
        assert first.response + await remaining_text(call) == REPLY


async def test_usage_is_exact(serve_scripted: ServiceMaker, demo_card: ModelCard) -> None:
    """Input tokens are what CountTokens counts, output tokens are those computed, and neurons their exact price."""
    async with serve_scripted(REPLY) as service:
        reply = await service.text.Generate(pb.GenerateRequest(prompt="a story"))
        count = await service.text.CountTokens(pb.CountTokensRequest(prompt="a story"))
        usage = reply.completion.usage
        assert usage.input_tokens == count.input_tokens
        assert usage.output_tokens == len(service.model.reply_ids)
        costs = demo_card.neuron_costs
        price = usage.input_tokens * costs["input_tokens"] + usage.output_tokens * costs["output_tokens"]
        assert Decimal(usage.neurons) == price


async def test_timings_are_in_order(serve_scripted: ServiceMaker) -> None:
    """queue_time <= time_to_first_token <= total_time, and the second of two calls has waited for the first."""
    async with serve_scripted(REPLY) as service:
        service.model.gate()
        calls = [service.text.Generate(pb.GenerateRequest(prompt=text)) for text in ("a", "b")]
        await service.wait_until_queued(1)
        service.model.open_gate()
        timings = [(await call).completion.timings for call in calls]
        for timing in timings:
            waited, first, total = (
                duration.ToTimedelta()
                for duration in (timing.queue_time, timing.time_to_first_token, timing.total_time)
            )
            assert waited <= first <= total
        assert max(timing.queue_time.ToNanoseconds() for timing in timings) > 0


async def test_max_tokens_is_exact(serve_scripted: ServiceMaker) -> None:
    """max_tokens tokens are computed, no more, and the finish reason says so."""
    async with serve_scripted(REPLY) as service:
        reply = await service.text.Generate(pb.GenerateRequest(prompt="a", max_tokens=3))
        assert reply.completion.finish_reason == pb.FINISH_REASON_MAX_TOKENS
        assert reply.completion.usage.output_tokens == 3
        assert REPLY.startswith(reply.response)


@pytest.mark.parametrize("stop", [["sea"], ["the s", "by the sea."], ["🦊"], ["zzz", "a time"], ["Once"]])
async def test_stop_sequences_cut_exactly(serve_scripted: ServiceMaker, stop: list[str]) -> None:
    """The reply ends before the first stop sequence that it completes, in both RPCs, and generation ends there."""
    async with serve_scripted(REPLY) as service:
        _, end = min((REPLY.index(text) + len(text), REPLY.index(text)) for text in stop if text in REPLY)
        request = pb.GenerateRequest(prompt="a", stop=stop)
        reply = await service.text.Generate(request)
        assert reply.response == REPLY[:end]
        assert await remaining_text(service.text.GenerateStream(request)) == REPLY[:end]
        assert reply.completion.finish_reason == pb.FINISH_REASON_STOP_SEQUENCE
        assert reply.completion.usage.output_tokens < len(service.model.reply_ids)


async def test_unfinished_stop_sequence_is_sent_at_the_end(serve_scripted: ServiceMaker) -> None:
    """Text held back because it might begin a stop sequence is not lost when the reply ends."""
    async with serve_scripted("Look at the sea") as service:
        reply = await service.text.Generate(pb.GenerateRequest(prompt="a", stop=["the seagull"]))
        assert reply.response == "Look at the sea"
        assert reply.completion.finish_reason == pb.FINISH_REASON_END_OF_SEQUENCE


async def test_raw_keeps_the_leading_space(serve_scripted: ServiceMaker) -> None:
    """A raw continuation keeps the space before its first word; a chat reply loses it."""
    async with serve_scripted("word") as service:
        raw = await service.text.Generate(pb.GenerateRequest(prompt="a", raw=True))
        chat = await service.text.Generate(pb.GenerateRequest(prompt="a"))
        assert (raw.response, chat.response) == (" word", "word")


async def test_violations_reach_the_caller(serve_scripted: ServiceMaker) -> None:
    """INVALID_ARGUMENT carries a BadRequest with every violation, and nothing runs."""
    async with serve_scripted() as service:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.text.Generate(pb.GenerateRequest(prompt="x" * 5000, top_p=3))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        bad_request = details(refused.value)["BadRequest"]
        assert isinstance(bad_request, error_details_pb2.BadRequest)
        assert [violation.field for violation in bad_request.field_violations] == ["prompt", "top_p"]
        assert service.model.prefills == 0


async def test_many_violations_fit_the_trailers(serve_scripted: ServiceMaker) -> None:
    """A thousand violations are cut to what fits, with the number of the rest."""
    async with serve_scripted() as service:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.text.Generate(pb.GenerateRequest(messages=[pb.ChatMessage()] * 1000))
        bad_request = details(refused.value)["BadRequest"]
        assert isinstance(bad_request, error_details_pb2.BadRequest)
        listed = bad_request.field_violations
        assert listed[-1].description == f"{2000 - len(listed) + 1} more violations are not listed"


@pytest.mark.parametrize("method", ["Generate", "CountTokens"])
async def test_malformed_bytes_are_an_invalid_argument(serve_scripted: ServiceMaker, method: str) -> None:
    """Bytes that are no message get INVALID_ARGUMENT, not UNKNOWN with a parser's text."""
    async with serve_scripted() as service:
        call: Any = service.channel.unary_unary(METHOD + method, None, None)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"\xff\xff\xff")
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "BadRequest" in details(refused.value)


async def test_malformed_bytes_on_the_stream(serve_scripted: ServiceMaker) -> None:
    """A text that is not UTF-8 is a malformed message too, also for GenerateStream."""
    async with serve_scripted() as service:
        call: Any = service.channel.unary_stream(METHOD + "GenerateStream", None, None)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"\x0a\x02\xff\xfe").read()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_unknown_method_is_unimplemented(serve_scripted: ServiceMaker) -> None:
    """An unknown method is answered as such."""
    async with serve_scripted() as service:
        call: Any = service.channel.unary_unary(METHOD + "Guess", None, None)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"")
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_cancelled_call_frees_the_slot(serve_scripted: ServiceMaker) -> None:
    """A caller who hangs up while generating stops the model within one step, and the next caller runs."""
    async with serve_scripted(REPLY, ends=False) as service:
        await disconnect(service, await hold_slot(service))
        decoded = len(service.model.decoded_rows)
        service.model.open_gate()
        assert (await _generate(service, "next", 2)).completion.usage.output_tokens == 2
        assert len(service.model.decoded_rows) == decoded + 2  # the step under way, and the next call's second token


async def _generate(service: Service, prompt: str, max_tokens: int) -> pb.GenerateResponse:
    reply: pb.GenerateResponse = await service.text.Generate(pb.GenerateRequest(prompt=prompt, max_tokens=max_tokens))
    return reply


async def test_caller_who_leaves_the_line_never_reaches_the_engine(serve_scripted: ServiceMaker) -> None:
    """A call cancelled while it waits is gone from the line; the model never sees it."""
    async with serve_scripted(REPLY) as service:
        holder = await hold_slot(service)
        waiting = asyncio.create_task(_generate(service, "waiting", 2))
        last = asyncio.create_task(_generate(service, "last", 2))
        await service.wait_until_queued(2)
        await disconnect(service, waiting)
        service.model.open_gate()
        assert REPLY.endswith(await remaining_text(holder))
        await last
        assert service.model.prefills == 2


async def test_caller_who_leaves_before_the_message(serve_scripted: ServiceMaker) -> None:
    """A call that is opened and given up before its message has come harms nobody."""
    async with serve_scripted(REPLY) as service:
        call: Any = service.channel.stream_unary(METHOD + "Generate", None, None)()
        await call.wait_for_connection()
        call.cancel()
        assert (await _generate(service, "next", 2)).completion.usage.output_tokens == 2


async def test_caller_who_leaves_during_prefill(serve_scripted: ServiceMaker) -> None:
    """A call cancelled while its prompt is being read gives the slot up before its first token."""
    async with serve_scripted(REPLY) as service:
        service.model.gate()
        call = asyncio.create_task(_generate(service, "leaving", 2))
        await asyncio.to_thread(service.model.in_step.wait, 10)
        await disconnect(service, call)
        service.model.open_gate()
        assert (await _generate(service, "next", 2)).completion.usage.output_tokens == 2


async def test_deadline_in_line(serve_scripted: ServiceMaker) -> None:
    """A call whose deadline passes in line ends with DEADLINE_EXCEEDED and never reaches the engine."""
    async with serve_scripted(REPLY) as service:
        holder = await hold_slot(service)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.text.Generate(pb.GenerateRequest(prompt="late"), timeout=0.2)
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        service.model.open_gate()
        await remaining_text(holder)
        assert service.model.prefills == 1


async def test_deadline_while_generating_frees_the_slot(serve_scripted: ServiceMaker) -> None:
    """A call whose deadline passes while it generates ends, and its slot is free for the next one."""
    async with serve_scripted(REPLY, ends=False) as service:
        service.model.gate()
        service.model.allow(1)
        call = service.text.GenerateStream(pb.GenerateRequest(prompt="slow"), timeout=0.5)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await remaining_text(call)
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        service.model.open_gate()
        assert (await _generate(service, "next", 2)).completion.usage.output_tokens == 2


async def test_reader_who_reads_nothing_never_holds_the_slot(serve_scripted: ServiceMaker) -> None:
    """A stream that nobody reads, far beyond the transport's windows, leaves the slot to the next call."""
    async with (
        serve_scripted("word " * 800) as service,
        grpc.aio.insecure_channel(service.address, SMALL_WINDOWS) as channel,
    ):
        stalled = type(service.text)(channel).GenerateStream(pb.GenerateRequest(prompt="stalled", max_tokens=700))
        await until(lambda: service.model.prefills == 1)
        assert (await _generate(service, "next", 2)).completion.usage.output_tokens == 2
        assert len((await remaining_text(stalled)).split()) > 300


@pytest.mark.parametrize("code", ["CANCELLED", "DEADLINE_EXCEEDED"])
async def test_reader_who_leaves_while_a_message_waits_for_him_is_no_fault(
    serve_scripted: ServiceMaker, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    """The call ends as any that its caller gives up: gRPC fails what is being sent before it delivers the cancel."""
    async with serve_scripted("word " * 800) as service:
        async with grpc.aio.insecure_channel(service.address, SMALL_WINDOWS) as channel:
            deadline = server_deadline(1000) if code == "DEADLINE_EXCEEDED" else ()
            request = pb.GenerateRequest(prompt="stalled", max_tokens=700)
            stalled = type(service.text)(channel).GenerateStream(request, metadata=deadline)
            await until(lambda: service.model.prefills == 1)
            await _generate(service, "next", 2)  # the model has finished with the first: it is all in the server
            if code == "CANCELLED":
                stalled.cancel()
            await until(lambda: service.finished_calls(code) == 1)
        assert service.finished_calls("OK") == 1
    assert not caplog.records


class StalledAccounts(AnonymousAuthenticator):
    """Refuses every caller, later than a call of 100 ms would wait."""

    def authenticate(self, metadata: Metadata) -> Account:
        """The processor is taken away from the whole server for so long."""
        time.sleep(0.3)
        raise Unauthenticated


async def test_refusal_after_the_deadline_is_counted_as_expired(serve_scripted: ServiceMaker) -> None:
    """Whom a refusal no longer reaches has seen his own deadline pass, and so it is counted."""
    async with serve_scripted(REPLY, accounts=StalledAccounts()) as service:
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await service.text.Generate(pb.GenerateRequest(prompt="a"), metadata=server_deadline(100))
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: service.finished_calls("DEADLINE_EXCEEDED") == 1)


async def test_engine_fault_is_internal_without_its_text(serve_scripted: ServiceMaker) -> None:
    """A fault in the engine is INTERNAL with a RequestInfo; no exception text leaves the server; the next call runs."""
    async with serve_scripted(REPLY) as service:
        service.model.failure = RuntimeError("secret of the house")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await service.text.Generate(pb.GenerateRequest(prompt="a"))
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in repr(failed.value)
        info = details(failed.value)["RequestInfo"]
        assert isinstance(info, error_details_pb2.RequestInfo)
        assert info.request_id
        service.model.failure = None
        assert (await service.text.Generate(pb.GenerateRequest(prompt="a"))).response == REPLY


async def test_a_fault_before_the_engine_is_internal(
    serve_scripted: ServiceMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong where nobody foresaw it ends the call at once, in the same words, and frees the slot."""
    async with serve_scripted(REPLY) as service:
        with monkeypatch.context() as patched:
            patched.setattr(Engine, "submit", lambda *_: 1 / 0)
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await service.text.Generate(pb.GenerateRequest(prompt="a story"), timeout=20)
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        assert failed.value.details() == "internal error; report the request id to the operator"
        assert (await _generate(service, "next", 2)).completion.usage.output_tokens == 2


@pytest.mark.parametrize("slots", [1, 4])
async def test_never_more_at_once_than_the_card_says(
    serve_scripted: ServiceMaker, demo_card: ModelCard, slots: int
) -> None:
    """Under 200 concurrent calls the model never steps more sequences than max_concurrent_requests."""
    quota = RequestsPerMinute(default=1000)
    card = with_config(demo_card, max_concurrent_requests=slots, infer_response_cache=None, max_requests_per_min=quota)
    async with serve_scripted(REPLY, card=card, max_queue_size=200) as service:
        replies = await asyncio.gather(*(_generate(service, f"call {index}", 8) for index in range(200)))
        assert {reply.completion.usage.output_tokens for reply in replies} == {8}
        assert service.model.prefills == 200
        assert max(service.model.decoded_rows) == slots


async def test_drain_finishes_who_runs_and_refuses_who_waits(serve_scripted: ServiceMaker) -> None:
    """On shutdown watchers hear NOT_SERVING and end, who waits gets UNAVAILABLE with RetryInfo, who runs finishes."""
    async with serve_scripted(REPLY) as service:
        holder = await hold_slot(service)
        watch = health_stub(service.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        waiting = asyncio.create_task(_generate(service, "waiting", 2))
        await service.wait_until_queued(1)
        ending = asyncio.create_task(_leave_when_refused(service, waiting))
        reading = asyncio.create_task(remaining_text(holder))
        statuses = asyncio.create_task(_statuses(watch))
    assert isinstance(await ending, error_details_pb2.RetryInfo)
    assert REPLY.endswith(await reading)
    assert await statuses == [health_pb2.HealthCheckResponse.NOT_SERVING]


async def _leave_when_refused(service: Service, waiting: "asyncio.Task[pb.GenerateResponse]") -> Message:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await waiting
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    return details(refused.value)["RetryInfo"]


async def _statuses(watch: Any) -> list[int]:
    statuses = []
    while isinstance(message := await watch.read(), health_pb2.HealthCheckResponse):
        statuses.append(message.status)
    return statuses


async def test_health_of_server_and_services(serve_scripted: ServiceMaker) -> None:
    """The whole server ("") and each service are SERVING; an unknown one is NOT_FOUND."""
    async with serve_scripted() as service:
        stub = health_stub(service.channel)
        for name in ("", "llama2.v1.TextGenerationService", "llama2.v1.ModelService"):
            state = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert state.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_can_be_turned_off(serve_scripted: ServiceMaker) -> None:
    """With reflection off the service is not there."""
    async with serve_scripted(reflection=False) as service:
        stub = reflection_stub(service.channel)
        call = stub.ServerReflectionInfo()
        with pytest.raises(grpc.aio.AioRpcError) as refused:  # whichever of the two notices
            await _ask_reflection(call)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def _ask_reflection(call: Any) -> None:
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    await call.read()


async def test_model_card_is_the_card(serve_scripted: ServiceMaker, demo_card: ModelCard) -> None:
    """GetModelCard returns identity, limits, prices and both schemas of the card in force."""
    async with serve_scripted(card=demo_card) as service:
        card = (await service.models.GetModelCard(model_pb2.GetModelCardRequest())).model_card
        assert (card.id, card.name, card.description) == (demo_card.id, demo_card.name, demo_card.description)
        assert (card.task.name, list(card.tags)) == (demo_card.task.name, list(demo_card.tags))
        assert card.limits.context_length_limit == demo_card.context_length_limit
        assert card.limits.sequence_length_limit == demo_card.sequence_length_limit
        assert card.limits.max_concurrent_requests == demo_card.max_concurrent_requests
        assert card.quota.max_requests_per_min == demo_card.constellation_config.max_requests_per_min.default
        assert {price.metric: Decimal(price.neuron_cost) for price in card.prices} == demo_card.neuron_costs
        assert card.generation_defaults.max_tokens == demo_card.default_max_tokens
        assert card.generation_defaults.temperature == demo_card.generation_config.temperature
        assert (card.input_schema, card.output_schema) == (demo_card.input_schema, demo_card.output_schema)
        assert [entry.property_id for entry in card.properties] == [entry.property_id for entry in demo_card.properties]
        for sent, entry in zip(card.properties, demo_card.properties, strict=True):
            assert sent.value == entry.value or sent.property_id == "constellation_config"


async def test_count_tokens_refuses_bad_input(serve_scripted: ServiceMaker) -> None:
    """CountTokens holds its request to the same rules."""
    async with serve_scripted() as service:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await service.text.CountTokens(pb.CountTokensRequest())
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
