"""Repeated calls with an idempotency key are one call, over a real socket on a scripted model."""

import asyncio
import itertools
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

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
from tests.support.service import ServiceMaker, details, disconnect, hold_slot, remaining_text, until

from llama2.v1 import text_generation_pb2 as pb
from llama2_client.receipts import read_public_key, receipt_document, verify_receipt
from llama2_client.reply import Reply
from llama2_server.admission import retry_times
from llama2_server.api import completion
from llama2_server.card import ModelCard
from llama2_server.receipts.keys import public_file, write_new_key


async def test_repeated_call_is_one_call(serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path) -> None:
    """Both RPCs get the same text and completion; there is one record, and one unit of a quota of one."""
    async with serve_scripted(REPLY, card=limited(demo_card, 1)) as service:
        first = await service.text.Generate(keyed())
        again = await service.text.Generate(keyed())
        text, completion = await read_stream(service, keyed())
        assert first.response == again.response == text == REPLY
        assert without_timings(first.completion) == without_timings(again.completion) == without_timings(completion)
        assert not first.completion.cached
        assert service.model.prefills == 1
        error = await failure(service.text.Generate(keyed("another")))
        assert details(error)["ErrorInfo"].reason == "QUOTA_EXCEEDED"  # type: ignore[attr-defined]
    (record,) = records(tmp_path)
    assert record["request_id"] == first.completion.request_id
    assert str(record["neurons"].normalize()) == first.completion.usage.neurons


async def test_lost_reply_after_a_restart_is_computed_again(
    serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path
) -> None:
    """After a restart the reply is computed with the recorded seed, on the same record, without quota."""
    card = limited(demo_card, 1)
    async with serve_scripted(REPLY, card=card) as service:
        first = await service.text.Generate(keyed())
    async with serve_scripted(REPLY, card=card) as service:
        again = await service.text.Generate(keyed())
        assert service.model.prefills == 1
        await service.text.Generate(pb.GenerateRequest(prompt="the quota is not used"))
    assert again.response == REPLY
    assert without_timings(again.completion) == without_timings(first.completion)
    assert len(list(records(tmp_path))) == 2


async def test_the_receipt_is_that_of_the_first_reply(
    serve_scripted: ServiceMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply that is computed again after a restart has the signed statement of the first one, with its time."""
    hours = itertools.count()
    clock = SimpleNamespace(now=lambda tz: datetime(2026, 11, 27, next(hours), tzinfo=tz))
    monkeypatch.setattr(completion, "datetime", clock)
    key = tmp_path / "receipts.key"
    write_new_key(key)
    async with serve_scripted(REPLY, receipt_key=key) as service:
        first = await service.text.Generate(keyed())
    async with serve_scripted(REPLY, receipt_key=key) as service:
        again = await service.text.Generate(keyed())
        assert service.model.prefills == 1
    document = receipt_document(Reply.from_proto(again.response, again.completion, keyed()))
    assert verify_receipt(document, [read_public_key(public_file(key))]).request_id == first.completion.request_id
    assert again.completion.receipt == first.completion.receipt


async def test_the_fourth_recomputation_is_billed(
    serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path
) -> None:
    """Three recomputations cost nothing; the next one costs quota and neurons, as a record linked to the first one."""
    async with serve_scripted(REPLY, card=limited(demo_card, 2), resume_window_seconds=0) as service:
        first = await service.text.Generate(keyed())
        replies = [await service.text.Generate(keyed()) for _ in range(3)]
        assert len(list(records(tmp_path))) == 1
        replies.append(await service.text.Generate(keyed()))
        used_up = await failure(service.text.Generate(keyed()))
        assert details(used_up)["ErrorInfo"].reason == "QUOTA_EXCEEDED"  # type: ignore[attr-defined]
        assert service.model.prefills == 5
    assert {reply.response for reply in replies} == {REPLY}
    assert all(without_timings(reply.completion) == without_timings(first.completion) for reply in replies)
    own, linked = sorted(records(tmp_path), key=lambda record: len(record["request_id"]))
    assert own["request_id"] == first.completion.request_id
    assert linked["request_id"].startswith(f"{own['request_id']}-")
    assert (linked["output_tokens"], linked["neurons"]) == (own["output_tokens"], own["neurons"])


async def test_concurrent_duplicates_join_the_running_generation(
    serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path
) -> None:
    """A duplicate during the generation reads it from its start, with `no_cache` or not."""
    async with serve_scripted(REPLY, card=limited(demo_card, 1)) as service:
        call, text = await start_stream(service, keyed())
        others = [
            asyncio.ensure_future(read_stream(service, keyed(no_cache=no_cache))) for no_cache in (True, False, True)
        ]
        service.model.open_gate()
        assert text + await remaining_text(call) == REPLY
        for other, completion in await asyncio.gather(*others):
            assert (other, completion.cached) == (REPLY, False)
        assert service.model.prefills == 1
    assert len(list(records(tmp_path))) == 1


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (keyed(prompt="another story"), "prompt"),
        (keyed(temperature=0.5), "temperature"),
        (keyed(seed=1), "seed"),
        (keyed(stop=["x"]), "stop"),
        (keyed(max_tokens=5), "max_tokens"),
        (
            pb.GenerateRequest(idempotency_key="key", messages=[pb.ChatMessage(role="user", content="a story")]),
            "messages",
        ),
    ],
)
async def test_another_request_with_the_key_is_rejected(
    serve_scripted: ServiceMaker, other: pb.GenerateRequest, field: str, tmp_path: Path
) -> None:
    """The error names the field, during the first call and after it; nothing is generated or recorded."""
    async with serve_scripted(REPLY) as service:
        call, _ = await start_stream(service, keyed())
        during = await failure(service.text.Generate(other))
        service.model.open_gate()
        await remaining_text(call)
        after = await failure(service.text.Generate(other))
        for error in (during, after):
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            found = details(error)
            assert found["ErrorInfo"].reason == "IDEMPOTENCY_KEY_REUSED"  # type: ignore[attr-defined]
            assert [v.field for v in found["BadRequest"].field_violations] == [field]  # type: ignore[attr-defined]
        assert service.model.prefills == 1
    assert len(list(records(tmp_path))) == 1


async def test_keys_belong_to_accounts(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """The same key of another account is another call."""
    async with serve_scripted(REPLY, accounts=AccountByHeader()) as service:
        first = await service.text.Generate(keyed(), metadata=as_account("a"))
        other = await service.text.Generate(keyed(prompt="other"), metadata=as_account("b"))
    assert first.completion.request_id != other.completion.request_id
    assert len(list(records(tmp_path))) == 2


@pytest.mark.parametrize("key", ["", "x" * 129, "tab\t", "line\n", "\x7f"])
async def test_invalid_key(serve_scripted: ServiceMaker, key: str) -> None:
    """A key has 1 to 128 printable characters."""
    async with serve_scripted(REPLY) as service:
        error = await failure(service.text.Generate(keyed(key)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert [v.field for v in details(error)["BadRequest"].field_violations] == ["idempotency_key"]  # type: ignore[attr-defined]


async def test_rejected_calls_bind_no_key(
    serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an invalid request, a full queue and a used-up quota, another request can use the key."""
    monkeypatch.setattr(retry_times, "EXPIRY_SECONDS", 3600)
    # One of the three requests is kept for the call that the full queue rejects.
    async with serve_scripted(REPLY, card=limited(demo_card, 3), max_queue_size=0) as service:
        await failure(service.text.Generate(keyed(temperature=9)))
        holder = await hold_slot(service)
        full = await failure(service.text.Generate(keyed(prompt="one")))
        assert details(full)["ErrorInfo"].reason == "QUEUE_FULL"  # type: ignore[attr-defined]
        await disconnect(service, holder)
        await wait_until_stopped(service)
        assert (await service.text.Generate(keyed(prompt="two"))).response == REPLY
        used_up = await failure(service.text.Generate(keyed("other")))
        assert details(used_up)["ErrorInfo"].reason == "QUOTA_EXCEEDED"  # type: ignore[attr-defined]
    assert len(stored_keys(tmp_path)) == 1
    assert len(list(records(tmp_path))) == 2


async def test_failed_call_keeps_the_key(serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path) -> None:
    """After INTERNAL, the next call of the key completes the same record, without quota; the error is not replayed."""
    async with serve_scripted(REPLY, card=limited(demo_card, 1)) as service:
        service.model.failure = RuntimeError("broken")
        assert (await failure(service.text.Generate(keyed()))).code() is grpc.StatusCode.INTERNAL
        await until(lambda: bool(list(records(tmp_path))))
        (failed,) = records(tmp_path)
        service.model.failure = None
        reply = await service.text.Generate(keyed())
        assert reply.response == REPLY
    (record,) = records(tmp_path)
    assert (failed["outcome"], record["outcome"]) == ("INTERNAL", "END_OF_SEQUENCE")
    assert failed["request_id"] == record["request_id"] == reply.completion.request_id


async def test_reply_of_the_response_cache(
    serve_scripted: ServiceMaker, caching_card: ModelCard, tmp_path: Path
) -> None:
    """A cached reply is used before the model, also for `no_cache`; the completion stays that of the first call."""
    async with serve_scripted(REPLY, card=caching_card, resume_window_seconds=0) as service:
        plain = await service.text.Generate(pb.GenerateRequest(prompt="a story"))
        first = await service.text.Generate(keyed())
        again = await service.text.Generate(keyed(no_cache=True))
        own = await service.text.Generate(keyed("own", prompt="own"))
        own_again = await service.text.Generate(keyed("own", prompt="own"))
        assert service.model.prefills == 2
    assert first.completion.cached
    assert first.completion.seed == plain.completion.seed
    assert without_timings(again.completion) == without_timings(first.completion)
    assert without_timings(own_again.completion) == without_timings(own.completion)
    assert not own_again.completion.cached
    assert [record["served_from_cache"] for record in records(tmp_path)] == [0, 1, 0]


async def test_database_has_no_text(
    serve_scripted: ServiceMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the database nor the log has the key, the prompt or the reply."""
    async with serve_scripted(REPLY) as service:
        await service.text.Generate(keyed("my-secret-key", prompt="my private words", stop=["my stop"]))
    content = b"".join(path.read_bytes() for path in tmp_path.glob("usage.db*")) + caplog.text.encode()
    for text in ("my-secret-key", "my private words", "my stop", "upon a time"):
        assert text.encode() not in content


async def test_expired_key_is_a_new_call(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """After the retention time, another request can use the key, and a resume finds nothing."""
    async with serve_scripted(REPLY, idempotency_retention_seconds=1e-6, resume_window_seconds=0) as service:
        first = await service.text.Generate(keyed())
        error = await failure(service.text.GenerateStream(keyed(resume_after_characters=1)))
        assert details(error)["ErrorInfo"].reason == "IDEMPOTENCY_KEY_UNKNOWN"  # type: ignore[attr-defined]
        other = await service.text.Generate(keyed(prompt="other"))
    assert first.completion.request_id != other.completion.request_id
    async with serve_scripted(REPLY):  # it deletes expired keys in the background
        await until(lambda: stored_keys(tmp_path) == [])
