"""Calls with an idempotency key in the queue, at their deadlines and during a drain, over a real socket."""

import asyncio
from pathlib import Path

import grpc
import pytest
from tests.integration.idempotency.conftest import (
    REPLY,
    failure,
    keyed,
    read_stream,
    start_stream,
    stored_keys,
    wait_until_stopped,
    without_timings,
)
from tests.integration.service.conftest import limited, records
from tests.support.accounts import AccountByHeader, as_account
from tests.support.deadlines import CallDeadlines, LoopClock, server_deadline
from tests.support.service import (
    Service,
    ServiceMaker,
    UnaryStream,
    details,
    disconnect,
    hold_slot,
    remaining_text,
    until,
)

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard
from llama2_server.engine.fingerprint.fingerprint import Fingerprint


async def test_a_passed_deadline_keeps_the_key(
    serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path, deadlines: CallDeadlines
) -> None:
    """After DEADLINE_EXCEEDED, the next call of the key completes the same record, without quota."""
    async with serve_scripted(REPLY, card=limited(demo_card, 1), resume_window_seconds=0) as service:
        service.model.gate()
        service.model.allow(1)
        late: UnaryStream = service.text.GenerateStream(keyed(), metadata=server_deadline())
        begin = (await late.read()).response
        await service.wait_until_in_step()
        deadlines.expire()
        with pytest.raises(grpc.aio.AioRpcError) as expired:
            await remaining_text(late)
        assert expired.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await wait_until_stopped(service)
        (stopped,) = records(tmp_path)
        rest, completion = await read_stream(service, keyed(resume_after_characters=len(begin)))
    assert begin + rest == REPLY
    (record,) = records(tmp_path)
    assert (stopped["outcome"], record["outcome"]) == ("DEADLINE_EXCEEDED", "END_OF_SEQUENCE")
    assert stopped["request_id"] == record["request_id"] == completion.request_id


async def test_a_call_that_waits_too_long_binds_no_key(
    serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path, clock: LoopClock
) -> None:
    """A rejection in the queue gives the quota back, leaves no record, and frees the key for another request."""
    async with serve_scripted(REPLY, card=limited(demo_card, 2), queue_timeout_seconds=30) as service:
        holder = await hold_slot(service)
        queued = asyncio.create_task(failure(service.text.Generate(keyed())))
        await service.wait_until_queued(1)
        clock.advance(30)  # shorter than the window of the quota
        assert details(await queued)["ErrorInfo"].reason == "QUEUE_WAIT_TOO_LONG"  # type: ignore[attr-defined]
        service.model.open_gate()
        await remaining_text(holder)
        assert (await service.text.Generate(keyed(prompt="another request"))).response == REPLY
    assert [record["outcome"] for record in records(tmp_path)] == ["END_OF_SEQUENCE"] * 2


async def test_a_call_that_a_drain_rejects_binds_no_key(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """A queued call of a server that shuts down leaves its key free for another request."""
    async with serve_scripted(REPLY) as service:
        holder = await hold_slot(service)
        queued = asyncio.create_task(failure(service.text.Generate(keyed())))
        await service.wait_until_queued(1)
        reading = asyncio.create_task(remaining_text(holder))
    assert details(await queued)["ErrorInfo"].reason == "SHUTTING_DOWN"  # type: ignore[attr-defined]
    await reading
    assert stored_keys(tmp_path) == []
    async with serve_scripted(REPLY) as service:
        assert (await service.text.Generate(keyed(prompt="another request"))).response == REPLY


async def test_a_drain_stops_an_unread_generation(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """It ends within one step, although its window lasts longer; the tokens after the break are not billed."""
    async with serve_scripted(REPLY, ends=False, resume_window_seconds=3600) as service:
        call, _ = await start_stream(service, keyed(), deltas=3)
        await disconnect(service, call)
        before = len(service.model.decoded_rows)
    assert len(service.model.decoded_rows) <= before + 1
    (record,) = records(tmp_path)
    assert (record["outcome"], record["output_tokens"]) == ("CANCELLED", 3)


async def test_recomputations_wait_in_the_queue(serve_scripted: ServiceMaker) -> None:
    """A lost reply takes a slot like any call, and is computed once for all calls of its key."""
    async with serve_scripted(REPLY, resume_window_seconds=0) as service:
        first = await service.text.Generate(keyed())
        holder = await hold_slot(service)
        again = [asyncio.ensure_future(service.text.Generate(keyed())) for _ in range(3)]
        await until(lambda: _joined(service) == 2)
        await service.wait_until_queued(1)
        assert service.model.prefills == 2
        service.model.open_gate()
        await remaining_text(holder)
        for reply in await asyncio.gather(*again):
            assert reply.response == REPLY
            assert without_timings(reply.completion) == without_timings(first.completion)
        assert service.model.prefills == 3


async def test_recomputations_take_the_share_of_their_account(serve_scripted: ServiceMaker) -> None:
    """An account that has three replies computed again gets every second slot while another account waits."""
    async with serve_scripted(REPLY, accounts=AccountByHeader(), resume_window_seconds=0) as service:
        keys = ("one", "two", "three")
        for key in keys:
            await service.text.Generate(keyed(key), metadata=as_account("a"))
        holder = await hold_slot(service, metadata=as_account("holder"))
        again = [(keyed(key), as_account("a")) for key in keys]
        other = [(pb.GenerateRequest(prompt="another story"), as_account("b"))] * 3
        calls = []
        for request, account in again + other:
            calls.append(asyncio.ensure_future(service.text.Generate(request, metadata=account)))
            await service.wait_until_queued(len(calls))
        service.model.open_gate()
        await remaining_text(holder)
        await asyncio.gather(*calls)
        story, *_, another = service.model.prompts
        assert service.model.prompts[len(keys) + 1 :] == [story, another] * 3


async def test_a_full_queue_rejects_a_recomputation(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """The key stays bound: the next call gets the reply, on the same record."""
    async with serve_scripted(REPLY, resume_window_seconds=0, max_queue_size=0) as service:
        first = await service.text.Generate(keyed())
        holder = await hold_slot(service)
        full = await failure(service.text.Generate(keyed()))
        assert details(full)["ErrorInfo"].reason == "QUEUE_FULL"  # type: ignore[attr-defined]
        service.model.open_gate()
        await remaining_text(holder)
        await wait_until_stopped(service)
        again = await service.text.Generate(keyed())
    assert without_timings(again.completion) == without_timings(first.completion)
    assert len(list(records(tmp_path))) == 2


async def test_without_a_fingerprint_nothing_is_computed_again(serve_scripted: ServiceMaker) -> None:
    """A reply that can depend on its neighbors is never continued by another computation."""
    fingerprint = Fingerprint({"kernels": "scripted"}, "scripted", depends_on_neighbors=True)
    async with serve_scripted(REPLY, fingerprint=fingerprint, resume_window_seconds=0) as service:
        await service.text.Generate(keyed("complete"))
        call, text = await start_stream(service, keyed("cut"), deltas=2)
        await disconnect(service, call)
        await wait_until_stopped(service)
        for request in (keyed("complete"), keyed("cut", resume_after_characters=len(text))):
            error = await failure(service.text.GenerateStream(request))
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert details(error)["ErrorInfo"].reason == "FINGERPRINT_CHANGED"  # type: ignore[attr-defined]
        assert service.model.prefills == 2


def _joined(service: Service) -> float:
    return service.metrics.registry.get_sample_value("llama2_idempotency_calls_total", {"result": "joined"}) or 0
