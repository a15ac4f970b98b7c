"""A stream with an idempotency key continues where it broke off."""

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
)
from tests.integration.service.conftest import limited, records
from tests.support.scripted_model import scripted_fingerprint
from tests.support.service import ServiceMaker, details, disconnect, generate, until

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard
from llama2_server.engine.fingerprint.fingerprint import Fingerprint


async def test_resume_at_every_character(serve_scripted: ServiceMaker) -> None:
    """The stream has the rest of the text by code points; at its end, only the completion."""
    async with serve_scripted(REPLY) as service:
        await service.text.Generate(keyed())
        for position in range(len(REPLY) + 1):
            text, completion = await read_stream(service, keyed(resume_after_characters=position))
            assert text == REPLY[position:]
            assert completion.finish_reason == pb.FINISH_REASON_END_OF_SEQUENCE
        assert service.model.prefills == 1


async def test_resume_beyond_the_text(serve_scripted: ServiceMaker) -> None:
    """A position after the end of the text is INVALID_ARGUMENT."""
    async with serve_scripted(REPLY) as service:
        await service.text.Generate(keyed())
        error = await failure(service.text.GenerateStream(keyed(resume_after_characters=len(REPLY) + 1)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        (violation,) = details(error)["BadRequest"].field_violations  # type: ignore[attr-defined]
        assert (violation.field, str(len(REPLY)) in violation.description) == ("resume_after_characters", True)


async def test_resume_needs_a_known_key_and_a_stream(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """An unknown key is FAILED_PRECONDITION, and generates nothing; Generate and a missing key are INVALID_ARGUMENT."""
    async with serve_scripted(REPLY) as service:
        unknown = await failure(service.text.GenerateStream(keyed(resume_after_characters=1)))
        assert unknown.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert details(unknown)["ErrorInfo"].reason == "IDEMPOTENCY_KEY_UNKNOWN"  # type: ignore[attr-defined]
        for call in (
            service.text.Generate(keyed(resume_after_characters=0)),
            service.text.GenerateStream(pb.GenerateRequest(prompt="x", resume_after_characters=0)),
            service.text.GenerateStream(keyed(resume_after_characters=-1)),
        ):
            assert (await failure(call)).code() is grpc.StatusCode.INVALID_ARGUMENT
        assert service.model.prefills == 0
    assert not list(records(tmp_path))
    assert not stored_keys(tmp_path)


async def test_broken_stream_continues_in_the_window(
    serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path
) -> None:
    """The generation goes on without its client; the client gets the rest, for one record and one quota unit."""
    async with serve_scripted(REPLY, card=limited(demo_card, 1)) as service:
        call, text = await start_stream(service, keyed(), deltas=3)
        await disconnect(service, call)
        service.model.open_gate()
        rest, completion = await read_stream(service, keyed(resume_after_characters=len(text)))
        assert text + rest == REPLY
        assert service.model.prefills == 1
    (record,) = records(tmp_path)
    assert record["output_tokens"] == completion.usage.output_tokens
    assert str(record["neurons"].normalize()) == completion.usage.neurons
    assert record["outcome"] == "END_OF_SEQUENCE"


async def test_unread_generation_ends_for_a_waiting_call(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """A call that waits for the slot stops it within one step; the tokens after the break are not billed."""
    async with serve_scripted(REPLY, ends=False) as service:
        call, _ = await start_stream(service, keyed(), deltas=3)
        await disconnect(service, call)
        waiting = asyncio.ensure_future(generate(service, "waits", 1))
        await service.wait_until_queued(1)
        service.model.allow(1)
        await service.model.wait_until_blocked(4)
        service.model.open_gate()
        await waiting
    cut, other = sorted(records(tmp_path), key=lambda record: -record["output_tokens"])
    assert (cut["outcome"], cut["output_tokens"]) == ("CANCELLED", 3)
    assert other["outcome"] == "MAX_TOKENS"


async def test_a_generation_that_all_readers_left_frees_the_slot(
    serve_scripted: ServiceMaker, caching_card: ModelCard
) -> None:
    """A call without a key that shares the generation keeps it running; after both have left, a third call stops it."""
    async with serve_scripted(REPLY, card=caching_card, ends=False) as service:
        call, _ = await start_stream(service, keyed(seed=1))
        sharing = service.text.GenerateStream(pb.GenerateRequest(prompt="a story", seed=1))
        await sharing.read()
        await disconnect(service, call)
        await disconnect(service, sharing)
        waiting = asyncio.ensure_future(generate(service, "waits", 1))
        service.model.open_gate()
        await waiting


async def test_break_while_a_call_waits_frees_the_slot(serve_scripted: ServiceMaker) -> None:
    """A keyed call that breaks off while another one waits stops as one without a key."""
    async with serve_scripted(REPLY, ends=False) as service:
        call, _ = await start_stream(service, keyed())
        waiting = asyncio.ensure_future(generate(service, "waits", 1))
        await service.wait_until_queued(1)
        await disconnect(service, call)
        service.model.open_gate()
        await waiting


async def test_queued_call_leaves_the_queue(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """A keyed call that breaks off in the queue leaves it, and keeps its key and its record."""
    async with serve_scripted(REPLY) as service:
        holder, _ = await start_stream(service, pb.GenerateRequest(prompt="hold"))
        queued = service.text.GenerateStream(keyed())
        await service.wait_until_queued(1)
        await disconnect(service, queued)
        await service.wait_until_queued(0)
        await disconnect(service, holder)
        service.model.open_gate()
        text, completion = await read_stream(service, keyed())
        assert text == REPLY
    found = {record["request_id"]: record["outcome"] for record in records(tmp_path)}
    assert found[completion.request_id] == "END_OF_SEQUENCE"
    assert len(found) == 2


async def test_window_ends(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """Without a window the generation stops at the break; a later call computes the reply on the same record."""
    async with serve_scripted(REPLY, resume_window_seconds=0) as service:
        call, text = await start_stream(service, keyed(), deltas=2)
        await disconnect(service, call)
        await wait_until_stopped(service)
        service.model.open_gate()
        rest, _ = await read_stream(service, keyed(resume_after_characters=len(text)))
        assert text + rest == REPLY
        assert service.model.prefills == 2
    assert len(list(records(tmp_path))) == 1


async def test_reply_that_completes_unread_is_billed_if_a_client_returns(
    serve_scripted: ServiceMaker, caching_card: ModelCard, tmp_path: Path
) -> None:
    """It enters neither the record nor the response cache before; after a return it is one complete record."""
    async with serve_scripted(REPLY, card=caching_card) as service:
        call, text = await start_stream(service, keyed(), deltas=2)
        await disconnect(service, call)
        await wait_until_stopped(service)
        other = await service.text.Generate(pb.GenerateRequest(prompt="a story"))
        assert not other.completion.cached
        rest, completion = await read_stream(service, keyed(resume_after_characters=len(text)))
        assert text + rest == REPLY
    bills = {record["request_id"]: record for record in records(tmp_path)}
    assert str(bills[completion.request_id]["neurons"].normalize()) == completion.usage.neurons


async def test_unread_reply_without_return_is_billed_to_the_break(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """A client that does not return pays for the tokens before the break."""
    async with serve_scripted(REPLY) as service:
        call, _ = await start_stream(service, keyed(), deltas=2)
        await disconnect(service, call)
        await wait_until_stopped(service)
    (record,) = records(tmp_path)
    assert (record["outcome"], record["output_tokens"]) == ("CANCELLED", 2)


@pytest.mark.parametrize("position", [0, 5])
async def test_another_fingerprint(serve_scripted: ServiceMaker, tmp_path: Path, position: int) -> None:
    """A reply is generated again by other weights only if it has no complete attempt and the client has no text."""
    async with serve_scripted(REPLY, resume_window_seconds=0) as service:
        call, _ = await start_stream(service, keyed("cut"), deltas=2)
        await disconnect(service, call)
        service.model.open_gate()
        await service.text.Generate(keyed("complete"))
    async with serve_scripted("Another text.", fingerprint=scripted_fingerprint("other")) as service:
        complete = await failure(service.text.GenerateStream(keyed("complete", resume_after_characters=position)))
        assert complete.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert details(complete)["ErrorInfo"].reason == "FINGERPRINT_CHANGED"  # type: ignore[attr-defined]
        if position:
            cut = await failure(service.text.GenerateStream(keyed("cut", resume_after_characters=position)))
            assert details(cut)["ErrorInfo"].reason == "FINGERPRINT_CHANGED"  # type: ignore[attr-defined]
        else:
            assert (await read_stream(service, keyed("cut")))[0] == "Another text."
    assert len(list(records(tmp_path))) == 2


async def test_a_start_that_hashes_its_weights_is_retried(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """A key whose reply needs the fingerprint stays valid: the call fails with a delay, and later gets the rest."""
    async with serve_scripted(REPLY, resume_window_seconds=0) as service:
        call, text = await start_stream(service, keyed("cut"), deltas=2)
        await disconnect(service, call)
        service.model.open_gate()
        await service.text.Generate(keyed("complete"))
    fingerprint = Fingerprint({"kernels": "scripted"}, "scripted")
    fingerprint.is_pending = True
    requests = (keyed("complete"), keyed("cut", resume_after_characters=len(text)))
    async with serve_scripted(REPLY, fingerprint=fingerprint) as service:
        for request in requests:
            error = await failure(service.text.GenerateStream(request))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            found = details(error)
            assert found["ErrorInfo"].reason == "FINGERPRINT_PENDING"  # type: ignore[attr-defined]
            assert "RetryInfo" in found
        assert service.model.prefills == 0
        fingerprint.set_weights("scripted")
        fingerprint.is_pending = False
        assert [(await read_stream(service, request))[0] for request in requests] == [REPLY, REPLY[len(text) :]]
    assert len(list(records(tmp_path))) == 2


async def test_a_running_key_gets_the_fingerprint(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """A key that is claimed while the weights are hashed has the fingerprint before its call ends."""
    fingerprint = Fingerprint({"kernels": "scripted"}, "scripted")
    fingerprint.is_pending = True
    async with serve_scripted(REPLY, fingerprint=fingerprint) as service:
        call, _ = await start_stream(service, keyed())
        assert [key["fingerprint"] for key in stored_keys(tmp_path)] == [None]
        fingerprint.set_weights("scripted")
        fingerprint.is_pending = False
        await until(lambda: [key["fingerprint"] for key in stored_keys(tmp_path)] == [fingerprint.value])
        await disconnect(service, call)
        service.model.open_gate()
