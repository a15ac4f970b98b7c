"""Generate and GenerateStream over a real socket: text, usage, timings and the end of a reply."""

import asyncio
from decimal import Decimal

import pytest
from tests.support.service import ServiceMaker, remaining_text, with_config

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard, RequestsPerMinute

REPLY = "Once upon a time, a fox 🦊 lived by the sea."


async def test_generate_gathers_the_stream(serve_scripted: ServiceMaker) -> None:
    """Both RPCs return the same text, byte for byte, and only the stream's last message has a completion."""
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


async def test_tokens_are_sent_as_they_are_generated(serve_scripted: ServiceMaker) -> None:
    """The client has the first delta before the model has computed the second token."""
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
    """Input tokens equal the result of CountTokens, output tokens the computed ones, and neurons the exact price."""
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
    """queue_time <= time_to_first_token <= total_time, and the second of two calls has a queue time."""
    async with serve_scripted(REPLY) as service:
        service.model.gate()
        calls = [service.text.Generate(pb.GenerateRequest(prompt=text)) for text in ("a", "b")]
        await service.wait_until_queued(1)
        service.model.open_gate()
        timings = [(await call).completion.timings for call in calls]
        for timing in timings:
            queued, first, total = (
                duration.ToTimedelta()
                for duration in (timing.queue_time, timing.time_to_first_token, timing.total_time)
            )
            assert queued <= first <= total
        assert max(timing.queue_time.ToNanoseconds() for timing in timings) > 0


async def test_max_tokens_is_exact(serve_scripted: ServiceMaker) -> None:
    """The model computes exactly max_tokens tokens, and the finish reason is MAX_TOKENS."""
    async with serve_scripted(REPLY) as service:
        reply = await service.text.Generate(pb.GenerateRequest(prompt="a", max_tokens=3))
        assert reply.completion.finish_reason == pb.FINISH_REASON_MAX_TOKENS
        assert reply.completion.usage.output_tokens == 3
        assert REPLY.startswith(reply.response)


@pytest.mark.parametrize("stop", [["sea"], ["the s", "by the sea."], ["🦊"], ["zzz", "a time"], ["Once"]])
async def test_stop_sequences_end_the_reply(serve_scripted: ServiceMaker, stop: list[str]) -> None:
    """In both RPCs, the reply ends before its first complete stop sequence, and generation ends there."""
    async with serve_scripted(REPLY) as service:
        _, end = min((REPLY.index(text) + len(text), REPLY.index(text)) for text in stop if text in REPLY)
        request = pb.GenerateRequest(prompt="a", stop=stop)
        reply = await service.text.Generate(request)
        assert reply.response == REPLY[:end]
        assert await remaining_text(service.text.GenerateStream(request)) == REPLY[:end]
        assert reply.completion.finish_reason == pb.FINISH_REASON_STOP_SEQUENCE
        assert reply.completion.usage.output_tokens < len(service.model.reply_ids)


async def test_incomplete_stop_sequence_is_sent_at_the_end(serve_scripted: ServiceMaker) -> None:
    """The end of a reply sends text that was held back as the possible start of a stop sequence."""
    async with serve_scripted("Look at the sea") as service:
        reply = await service.text.Generate(pb.GenerateRequest(prompt="a", stop=["the seagull"]))
        assert reply.response == "Look at the sea"
        assert reply.completion.finish_reason == pb.FINISH_REASON_END_OF_SEQUENCE


async def test_raw_keeps_the_leading_space(serve_scripted: ServiceMaker) -> None:
    """A raw continuation keeps the space before its first word; a chat reply does not."""
    async with serve_scripted("word") as service:
        raw = await service.text.Generate(pb.GenerateRequest(prompt="a", raw=True))
        chat = await service.text.Generate(pb.GenerateRequest(prompt="a"))
        assert (raw.response, chat.response) == (" word", "word")


@pytest.mark.parametrize("slots", [1, 4])
async def test_at_most_max_concurrent_requests_run(
    serve_scripted: ServiceMaker, demo_card: ModelCard, slots: int
) -> None:
    """Under 200 concurrent calls, no step of the model has more sequences than max_concurrent_requests."""
    quota = RequestsPerMinute(default=1000)
    card = with_config(demo_card, max_concurrent_requests=slots, infer_response_cache=None, max_requests_per_min=quota)
    async with serve_scripted(REPLY, card=card, max_queue_size=200) as service:
        requests = [pb.GenerateRequest(prompt=f"call {index}", max_tokens=8) for index in range(200)]
        replies = await asyncio.gather(*map(service.text.Generate, requests))
        assert {reply.completion.usage.output_tokens for reply in replies} == {8}
        assert service.model.prefills == 200
        assert max(service.model.decoded_rows) == slots
