"""Cancelled calls and slow readers, over a real socket."""

import asyncio
from typing import Any

import grpc.aio
import pytest
from tests.support.service import SMALL_WINDOWS, ServiceMaker, disconnect, generate, hold_slot, remaining_text, until

from llama2.v1 import text_generation_pb2 as pb

REPLY = "Once upon a time, a fox 🦊 lived by the sea."


async def test_cancelled_call_frees_the_slot(serve_scripted: ServiceMaker) -> None:
    """A disconnect during generation stops the model within one step, and the next call runs."""
    async with serve_scripted(REPLY, ends=False) as service:
        await disconnect(service, await hold_slot(service))
        decoded = len(service.model.decoded_rows)
        service.model.open_gate()
        assert (await generate(service, "next", 2)).completion.usage.output_tokens == 2
        assert len(service.model.decoded_rows) == decoded + 2  # the step in progress, and the next call's second token


async def test_call_cancelled_in_the_queue_never_reaches_the_engine(serve_scripted: ServiceMaker) -> None:
    """A call that is cancelled in the queue leaves the queue; the model never receives it."""
    async with serve_scripted(REPLY) as service:
        holder = await hold_slot(service)
        queued = asyncio.create_task(generate(service, "queued", 2))
        last = asyncio.create_task(generate(service, "last", 2))
        await service.wait_until_queued(2)
        await disconnect(service, queued)
        service.model.open_gate()
        assert REPLY.endswith(await remaining_text(holder))
        await last
        assert service.model.prefills == 2


async def test_call_cancelled_before_its_message(serve_scripted: ServiceMaker) -> None:
    """A call that is cancelled before its message arrives affects no other call."""
    async with serve_scripted(REPLY) as service:
        call: Any = service.channel.stream_unary("/llama2.v1.TextGenerationService/Generate", None, None)()
        await call.wait_for_connection()
        call.cancel()
        assert (await generate(service, "next", 2)).completion.usage.output_tokens == 2


async def test_call_cancelled_during_prefill(serve_scripted: ServiceMaker) -> None:
    """A call that is cancelled during its prefill frees the slot before its first token."""
    async with serve_scripted(REPLY) as service:
        service.model.gate()
        call = asyncio.create_task(generate(service, "cancelled", 2))
        await service.wait_until_in_step()
        await disconnect(service, call)
        service.model.open_gate()
        assert (await generate(service, "next", 2)).completion.usage.output_tokens == 2


async def test_slow_reader_never_holds_the_slot(serve_scripted: ServiceMaker) -> None:
    """A client that reads nothing of a reply far larger than the transport's windows leaves the slot to other calls."""
    async with (
        serve_scripted("word " * 800) as service,
        grpc.aio.insecure_channel(service.address, SMALL_WINDOWS) as channel,
    ):
        stalled = type(service.text)(channel).GenerateStream(pb.GenerateRequest(prompt="stalled", max_tokens=700))
        await until(lambda: service.model.prefills == 1)
        assert (await generate(service, "next", 2)).completion.usage.output_tokens == 2
        assert len((await remaining_text(stalled)).split()) > 300


async def test_disconnect_with_a_waiting_message_is_not_a_server_error(
    serve_scripted: ServiceMaker, caplog: pytest.LogCaptureFixture
) -> None:
    """The call counts as CANCELLED, although gRPC fails the pending write before it delivers the cancellation."""
    async with serve_scripted("word " * 800) as service:
        async with grpc.aio.insecure_channel(service.address, SMALL_WINDOWS) as channel:
            stalled = type(service.text)(channel).GenerateStream(pb.GenerateRequest(prompt="stalled", max_tokens=700))
            await until(lambda: service.model.prefills == 1)
            await generate(service, "next", 2)  # it gets the slot once the first reply waits in the server
            stalled.cancel()
            await until(lambda: service.finished_calls("CANCELLED") == 1)
        assert service.finished_calls("OK") == 1
    assert not caplog.records
