"""Deadlines that pass in the queue, during a generation, during a write and before a rejection."""

import asyncio
import threading

import grpc
import grpc.aio
import pytest
from tests.support.deadlines import DEADLINE_SECONDS, LoopClock, increasing_timeouts, server_deadline
from tests.support.service import (
    SMALL_WINDOWS,
    Service,
    ServiceMaker,
    generate,
    hold_slot,
    remaining_text,
    until,
)

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_server.admission.accounts import Account, AnonymousAuthenticator, Metadata
from llama2_server.errors import Unauthenticated

REPLY = "Once upon a time, a fox 🦊 lived by the sea."


async def test_deadline_passes_in_the_queue(serve_scripted: ServiceMaker, clock: LoopClock) -> None:
    """The call ends with DEADLINE_EXCEEDED and never reaches the engine."""
    async with serve_scripted(REPLY) as service:
        holder = await hold_slot(service)
        call = service.text.Generate(pb.GenerateRequest(prompt="late"), metadata=server_deadline())
        await service.wait_until_queued(1)
        clock.advance(DEADLINE_SECONDS)
        with pytest.raises(grpc.aio.AioRpcError) as expired:
            await call
        assert expired.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        service.model.open_gate()
        await remaining_text(holder)
        assert service.model.prefills == 1


async def test_deadline_during_a_generation_frees_the_slot(serve_scripted: ServiceMaker) -> None:
    """A call whose deadline passes during its generation ends, and the next call gets its slot."""
    async with serve_scripted(REPLY, ends=False) as service:
        for timeout in increasing_timeouts():
            service.model.gate()
            service.model.allow(1)
            call = service.text.GenerateStream(pb.GenerateRequest(prompt="slow"), timeout=timeout)
            try:
                generating = isinstance(await call.read(), pb.GenerateStreamResponse)
            except grpc.aio.AioRpcError:
                generating = False
            with pytest.raises(grpc.aio.AioRpcError) as expired:
                await remaining_text(call)
            assert expired.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            service.model.open_gate()
            assert (await generate(service, "next", 2)).completion.usage.output_tokens == 2
            if generating:
                break


async def test_deadline_with_a_waiting_message_is_not_a_server_error(
    serve_scripted: ServiceMaker, caplog: pytest.LogCaptureFixture
) -> None:
    """The call counts as expired, although gRPC fails the pending write before it delivers the cancellation."""
    async with serve_scripted("word " * 800) as service:
        async with grpc.aio.insecure_channel(service.address, SMALL_WINDOWS) as channel:
            for timeout in increasing_timeouts(2):
                finished = service.finished_calls("OK")
                if await _expires_with_a_waiting_message(service, channel, timeout):
                    break
        assert service.finished_calls("OK") == finished + 1
    assert not caplog.records


async def _expires_with_a_waiting_message(service: Service, channel: grpc.aio.Channel, timeout_seconds: float) -> bool:
    """Return whether the deadline passed when the whole reply waited in the server, not before."""
    prefills, expired = service.model.prefills, service.finished_calls("DEADLINE_EXCEEDED")
    request = pb.GenerateRequest(prompt="stalled", max_tokens=200)
    stalled = type(service.text)(channel).GenerateStream(request, metadata=server_deadline(timeout_seconds))
    await until(lambda: service.model.prefills > prefills or stalled.done())
    if stalled.done():
        return False
    await generate(service, "next", 2)  # it gets the slot once the first reply waits in the server
    if service.finished_calls("DEADLINE_EXCEEDED") > expired:
        return False
    await until(lambda: service.finished_calls("DEADLINE_EXCEEDED") == expired + 1)
    return True


class BlockingAuthenticator(AnonymousAuthenticator):
    """An authenticator that rejects each call, but blocks the event loop until the client has the call's status."""

    def __init__(self) -> None:
        self.called = False
        self.call_ended = threading.Event()

    def authenticate(self, metadata: Metadata) -> Account:
        """Raise Unauthenticated after the deadline."""
        self.called = True
        assert self.call_ended.wait(60)
        raise Unauthenticated

    def call(self, address: str, timeout_seconds: float) -> grpc.StatusCode:
        """Call the service, on another thread than the event loop's; return the status."""
        self.call_ended.clear()
        try:
            with grpc.insecure_channel(address) as channel:
                stub = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
                with pytest.raises(grpc.RpcError) as late:
                    stub.Generate(pb.GenerateRequest(prompt="a"), metadata=server_deadline(timeout_seconds))
            code: grpc.StatusCode = late.value.code()
            return code
        finally:
            self.call_ended.set()


async def test_rejection_after_the_deadline_counts_as_expired(serve_scripted: ServiceMaker) -> None:
    """The client of a late rejection receives DEADLINE_EXCEEDED, and the server counts the same code."""
    authenticator = BlockingAuthenticator()
    async with serve_scripted(REPLY, accounts=authenticator) as service:
        for timeout in increasing_timeouts():
            code = await asyncio.to_thread(authenticator.call, service.address, timeout)
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            if authenticator.called:
                break
        await until(lambda: service.finished_calls("DEADLINE_EXCEEDED") > 0)
        assert service.finished_calls("UNAUTHENTICATED") == 0
