"""Replicas with one PostgreSQL share their idempotency keys, over real sockets."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from tests.integration.idempotency.conftest import (
    REPLY,
    failure,
    keyed,
    read_stream,
    start_stream,
    without_timings,
)
from tests.integration.service.conftest import limited, records
from tests.integration.usage.conftest import KeyStatements, stored
from tests.support.processes import free_port
from tests.support.scripted_model import scripted_fingerprint
from tests.support.servers.postgres_server import PostgresCluster
from tests.support.service import Service, ServiceMaker, details, disconnect, hold_slot, remaining_text, until

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard
from llama2_server.idempotency.run import KeyRun
from llama2_server.usage.database import create_engine
from llama2_server.usage.keys import key_store, shared_keys
from llama2_server.usage.records import UsageRecord

Replica = Callable[..., Any]


@pytest.fixture
def url(postgres: PostgresCluster) -> str:
    """The URL of an empty usage store."""
    return postgres.new_database()


@pytest.fixture
def replica(serve_scripted: ServiceMaker, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Replica:
    """Return a function that runs a replica by its name; all share the usage store."""
    monkeypatch.setattr(shared_keys, "RENEW_SECONDS", 0.05)

    @asynccontextmanager
    async def serve(name: str, reply: str = REPLY, **options: Any) -> AsyncIterator[Service]:
        directory = tmp_path / name
        async with serve_scripted(reply, usage_url=url, data_directory=directory, **options) as service:
            yield service

    return serve


async def the_record(url: str) -> UsageRecord:
    """Return the only usage record."""
    (record,) = await stored(url)
    return record


async def rows(url: str, query: str) -> list[Any]:
    """Return the result of a query on the store."""
    engine = create_engine(url)
    async with engine.connect() as connection:
        found = [row[0] for row in await connection.execute(sa.text(query))]
    await engine.dispose()
    return found


async def until_rows(url: str, query: str, expected: list[Any], statements: KeyStatements) -> None:
    """Wait until a query on the store has this result, which a statement of a replica changes."""
    async with asyncio.timeout(60):
        while await rows(url, query) != expected:
            await statements.next_end()


async def test_call_on_a_second_replica_is_the_same_call(replica: Replica, demo_card: ModelCard, url: str) -> None:
    """It computes the text again with the recorded seed: one request id, one record, one price, one quota unit."""
    card = limited(demo_card, 1)
    async with replica("a", card=card) as a, replica("b", card=card) as b:
        first = await a.text.Generate(keyed())
        again = await b.text.Generate(keyed())
        text, completion = await read_stream(b, keyed(resume_after_characters=10))
        assert (first.response, again.response, text) == (REPLY, REPLY, REPLY[10:])
        assert without_timings(first.completion) == without_timings(again.completion) == without_timings(completion)
        assert not first.completion.idempotency_local
        assert (a.model.prefills, b.model.prefills) == (1, 1)
        await b.text.Generate(pb.GenerateRequest(prompt="the quota of b is not used"))
    (own, _) = sorted(await stored(url), key=lambda record: record.request_id != first.completion.request_id)
    assert (own.request_id, str(own.neurons.normalize())) == (
        first.completion.request_id,
        first.completion.usage.neurons,
    )


async def test_racing_calls_of_all_replicas_are_one_call(replica: Replica, url: str) -> None:
    """Of 24 calls on three replicas, one claims the key."""
    async with replica("a") as a, replica("b") as b, replica("c") as c:
        replies = await asyncio.gather(*(service.text.Generate(keyed()) for service in 8 * [a, b, c]))
    assert {reply.response for reply in replies} == {REPLY}
    assert len({without_timings(reply.completion).SerializeToString() for reply in replies}) == 1
    assert (await the_record(url)).request_id == replies[0].completion.request_id


async def test_a_replica_waits_while_another_one_generates(
    replica: Replica, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a reader, the first replica generates to the end; then the second one computes the text again."""
    statements = KeyStatements(monkeypatch)
    async with replica("a") as a, replica("b") as b:
        call, text = await start_stream(a, keyed())
        waiting = asyncio.ensure_future(b.text.Generate(keyed()))
        await until_rows(url, "SELECT count(*) FROM idempotency_keys WHERE wanted", [1], statements)
        assert b.model.prefills == 0
        a.model.open_gate()
        while isinstance(part := await call.read(), pb.GenerateStreamResponse):
            text += part.response
            completion = part.completion
        reply = await waiting
        assert text == reply.response == REPLY
        assert without_timings(reply.completion) == without_timings(completion)
    assert (await the_record(url)).outcome == "END_OF_SEQUENCE"


async def test_a_replica_hands_over_a_stream_that_broke_off(
    replica: Replica, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a reader, the first replica stops for the second one, which continues the text and the record."""
    stopped, stop = asyncio.Event(), KeyRun.stop

    def stop_and_tell(run: KeyRun) -> None:
        stop(run)
        stopped.set()

    monkeypatch.setattr(KeyRun, "stop", stop_and_tell)
    async with replica("a") as a, replica("b") as b:
        call, text = await start_stream(a, keyed(), deltas=3)
        await disconnect(a, call)
        waiting = asyncio.ensure_future(read_stream(b, keyed(resume_after_characters=len(text))))
        await stopped.wait()
        a.model.open_gate()
        rest, completion = await waiting
        assert text + rest == REPLY
    record = await the_record(url)
    assert (record.request_id, record.outcome) == (completion.request_id, "END_OF_SEQUENCE")
    assert str(record.neurons.normalize()) == completion.usage.neurons


async def test_another_request_with_the_key_is_rejected(replica: Replica, url: str) -> None:
    """Also on another replica, also while the first one generates."""
    async with replica("a") as a, replica("b") as b:
        call, _ = await start_stream(a, keyed())
        error = await failure(b.text.Generate(keyed(prompt="another story")))
        assert details(error)["ErrorInfo"].reason == "IDEMPOTENCY_KEY_REUSED"  # type: ignore[attr-defined]
        a.model.open_gate()
        await remaining_text(call)
        assert b.metrics.registry.get_sample_value("llama2_idempotency_calls_total", {"result": "conflict"}) == 1


async def test_rejected_call_binds_no_key(replica: Replica, url: str) -> None:
    """A key that the queue of one replica rejected is new on the other one, for another request."""
    async with replica("a", max_queue_size=0) as a, replica("b") as b:
        call = await hold_slot(a)
        error = await failure(a.text.Generate(keyed()))
        assert details(error)["ErrorInfo"].reason == "QUEUE_FULL"  # type: ignore[attr-defined]
        reply = await b.text.Generate(keyed(prompt="another story"))
        assert reply.response == REPLY
        a.model.open_gate()
        await disconnect(a, call)


async def test_other_weights_do_not_continue_a_text(replica: Replica) -> None:
    """A replica with another fingerprint rejects a reply that a client has seen."""
    async with replica("a") as a, replica("b", fingerprint=scripted_fingerprint("other")) as b:
        await a.text.Generate(keyed())
        error = await failure(b.text.Generate(keyed()))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert details(error)["ErrorInfo"].reason == "FINGERPRINT_CHANGED"  # type: ignore[attr-defined]


async def test_unknown_key_is_not_resumed(replica: Replica) -> None:
    """The replicas have no such key."""
    async with replica("a") as a:
        error = await failure(a.text.GenerateStream(keyed(resume_after_characters=1)))
        assert details(error)["ErrorInfo"].reason == "IDEMPOTENCY_KEY_UNKNOWN"  # type: ignore[attr-defined]


async def test_seed_of_a_cached_reply_is_known_to_all(replica: Replica, caching_card: ModelCard) -> None:
    """The key gets the seed of the reply that it came from, not the seed that its call drew."""
    async with replica("a", card=caching_card) as a, replica("b", card=caching_card) as b:
        cached = await a.text.Generate(pb.GenerateRequest(prompt="a story"))
        first = await a.text.Generate(keyed())
        again = await b.text.Generate(keyed())
    assert first.completion.cached
    assert first.completion.seed == cached.completion.seed
    assert without_timings(again.completion) == without_timings(first.completion)


async def test_expired_keys_are_deleted(replica: Replica, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the retention time, each replica deletes them from the store, and the key names a new call."""
    statements = KeyStatements(monkeypatch)
    monkeypatch.setattr("llama2_server.lifecycle.stores.KEY_PURGE_SECONDS", 0.05)
    async with replica("a", idempotency_retention_seconds=0.5) as a, replica("b") as b:
        first = await a.text.Generate(keyed())
        await until_rows(url, "SELECT count(*) FROM idempotency_keys", [0], statements)
        again = await b.text.Generate(keyed(prompt="another story"))
    assert first.completion.request_id != again.completion.request_id


async def test_keys_hold_locally_without_the_store(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """The completion states it, in all calls of the key; a metric counts the calls."""
    nowhere = f"postgresql://none@127.0.0.1:{free_port()}/none"
    async with serve_scripted(REPLY, usage_url=nowhere) as service:
        first, again = [await service.text.Generate(keyed()) for _ in range(2)]
        assert first.completion.idempotency_local
        assert without_timings(first.completion) == without_timings(again.completion)
        plain = await service.text.Generate(pb.GenerateRequest(prompt="without a key"))
        assert not plain.completion.idempotency_local
        assert service.metrics.registry.get_sample_value("llama2_idempotency_fallbacks_total") == 1
    assert len(list(records(tmp_path))) == 2


async def test_keys_are_rejected_without_the_store(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """With the fallback `reject`, a call with a key is UNAVAILABLE; a call without a key is served."""
    nowhere = f"postgresql://none@127.0.0.1:{free_port()}/none"
    async with serve_scripted(REPLY, usage_url=nowhere, idempotency_fallback="reject") as service:
        error = await failure(service.text.Generate(keyed()))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details(error)["ErrorInfo"].reason == "USAGE_UNAVAILABLE"  # type: ignore[attr-defined]
        assert "RetryInfo" in details(error)
        await service.text.Generate(pb.GenerateRequest(prompt="without a key"))
    assert len(list(records(tmp_path))) == 1


async def test_metrics_count_what_the_calls_found(serve_scripted: ServiceMaker, caching_card: ModelCard) -> None:
    """Each call with a key counts once; calls without one do not count."""
    async with serve_scripted(REPLY, card=caching_card, resume_window_seconds=0) as service:
        call, _ = await start_stream(service, keyed(no_cache=True))
        joined = asyncio.ensure_future(service.text.Generate(keyed()))
        await failure(service.text.Generate(keyed(prompt="another story")))
        service.model.open_gate()
        await remaining_text(call)
        await joined
        await service.text.Generate(keyed())  # not cached: the key's first call did not use the cache
        await service.text.Generate(pb.GenerateRequest(prompt="cached"))
        await service.text.Generate(keyed("other", prompt="cached"))
        await service.text.Generate(keyed("other", prompt="cached"))
        results = ("new", "joined", "cached", "recomputed", "conflict")
        value = service.metrics.registry.get_sample_value
        counts = [value("llama2_idempotency_calls_total", {"result": result}) for result in results]
        assert dict(zip(results, counts, strict=True)) == {
            "new": 2,
            "joined": 1,
            "cached": 1,
            "recomputed": 1,
            "conflict": 1,
        }


@pytest.mark.parametrize("tokens", [1, 40])
async def test_a_call_costs_two_statements_and_none_per_token(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """One claims the key, and after the reply one stores its end."""
    monkeypatch.setattr(shared_keys, "RENEW_SECONDS", 3600)
    executed: list[str] = []
    execute = key_store.PostgresKeyStore._execute

    async def count(self: Any, statement: str, *arguments: Any, **options: Any) -> Any:
        executed.append(statement.split(maxsplit=1)[0])
        return await execute(self, statement, *arguments, **options)

    monkeypatch.setattr(key_store.PostgresKeyStore, "_execute", count)
    async with replica("a", ends=False) as a:
        await until(lambda: "DELETE" in executed)  # the first purge
        executed.clear()
        await a.text.Generate(keyed(max_tokens=tokens))
        assert executed[0] == "INSERT"
        assert len(executed) <= 2
    assert executed == ["INSERT", "INSERT"]
