"""Idempotency keys in PostgreSQL: claims, servers that end, outages, and the round trips of a claim."""

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.integration.usage.conftest import KeyStatements, LedgerOpener, accept, admit, crash, key, until_up
from tests.support.servers.postgres_server import PostgresCluster, running_postgres

from llama2_server.errors import UsageUnavailable
from llama2_server.usage.keys import key_store, shared_keys
from llama2_server.usage.keys.records import KeyRecord, KeyState


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let servers renew their keys often, and hold them for a short time after their end."""
    monkeypatch.setattr(shared_keys, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(key_store, "_HOLD_MS", 500)


@pytest.fixture
def url(postgres: PostgresCluster) -> str:
    """The URL of an empty usage store."""
    return postgres.new_database()


@pytest.fixture(scope="module")
def unsteady() -> Iterator[PostgresCluster]:
    """A cluster that tests stop and start."""
    with running_postgres() as cluster:
        yield cluster


async def test_records_are_returned_as_claimed(open_ledger: LedgerOpener, url: str, tmp_path: Path) -> None:
    """All values pass through PostgreSQL, seeds beyond its integers too."""
    a, b = [await open_ledger(url=url, data_directory=tmp_path / name) for name in "ab"]
    claimed = await a.keys.claim(key("a"), accept)
    assert (claimed.record, claimed.is_new, claimed.is_shared) == (
        key("a", expires_at=claimed.record.expires_at),
        True,
        True,
    )
    complete = replace(await admit(a, claimed.record), state=KeyState.COMPLETE, completion=b"\x00\xff", computations=1)
    a.keys.put(complete)
    await a.keys.end(claimed, admitted=True)
    found = await b.keys.claim(key("b"), accept)
    assert (found.record, found.is_new) == (complete, False)


async def test_key_of_a_killed_server_is_free_after_its_hold(
    open_ledger: LedgerOpener, url: str, tmp_path: Path
) -> None:
    """Another server then continues the same request: it may have taken quota, so it takes none again."""
    a, b = [await open_ledger(url=url, data_directory=tmp_path / name) for name in "ab"]
    claimed = await a.keys.claim(key("a"), accept)
    waiting = asyncio.ensure_future(b.keys.claim(key("b"), accept))
    await asyncio.sleep(0)
    await crash(a)
    found = await waiting
    assert (found.record.request_id, found.record.seed, found.is_new) == ("a", claimed.record.seed, False)


async def test_restarted_server_frees_the_keys_of_its_predecessor(
    open_ledger: LedgerOpener, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It also sends what the killed one has stored."""
    monkeypatch.setattr(key_store, "_HOLD_MS", 3_600_000)
    a = await open_ledger(url=url, data_directory=tmp_path / "a")
    claimed = await a.keys.claim(key("a"), accept)
    a.keys.put(replace(await admit(a, claimed.record), state=KeyState.COMPLETE, completion=b"completion"))
    await a.commit()
    await crash(a)
    await open_ledger(url=url, data_directory=tmp_path / "a")
    b = await open_ledger(url=url, data_directory=tmp_path / "b")
    async with asyncio.timeout(60):
        found = await b.keys.claim(key("b"), accept)
        while not found.record.completion:
            await b.keys.end(found, admitted=True)
            found = await b.keys.claim(key("b"), accept)
    assert (found.record.request_id, found.record.state, found.record.completion) == (
        "a",
        KeyState.COMPLETE,
        b"completion",
    )


async def test_the_first_completion_stays(open_ledger: LedgerOpener, url: str, tmp_path: Path) -> None:
    """A server that lost its hold changes neither completion nor seed; it can only raise numbers."""
    a, b = [await open_ledger(url=url, data_directory=tmp_path / name) for name in "ab"]
    claimed = await a.keys.claim(key("a"), accept)
    opened = await admit(a, claimed.record)
    await a.keys.end(claimed, admitted=True)
    at_b = await b.keys.claim(key("b"), accept)
    first = replace(at_b.record, state=KeyState.COMPLETE, completion=b"first", computations=1)
    await b.keys.share(first)
    await a.keys.share(replace(opened, seed=1, state=KeyState.COMPLETE, completion=b"second", computations=2))
    await b.keys.end(at_b, admitted=True)
    found = await b.keys.claim(key("c"), accept)
    assert found.record == replace(first, computations=2)


async def test_rejected_call_frees_its_key(open_ledger: LedgerOpener, url: str, tmp_path: Path) -> None:
    """The next call of any server is a new one."""
    a, b = [await open_ledger(url=url, data_directory=tmp_path / name) for name in "ab"]
    await a.keys.end(await a.keys.claim(key("a"), accept), admitted=False)
    assert (await b.keys.claim(key("b"), accept)).is_new


async def test_another_request_waits_for_the_key_of_a_call_that_may_be_rejected(
    open_ledger: LedgerOpener, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only then is the key its own; the claim of a server that has ended counts. The holder learns that it waits."""

    def refuse(record: KeyRecord) -> None:
        if record.request_id == "a":
            raise AnotherRequest

    a, b = [await open_ledger(url=url, data_directory=tmp_path / name) for name in "ab"]
    first = await a.keys.claim(key("a"), accept)
    wanted, renewals = asyncio.Event(), KeyStatements(monkeypatch, "UPDATE")
    a.keys.on_wanted(lambda _: wanted.set())
    for _ in range(3):
        await renewals.next_end()
    assert not wanted.is_set()
    second = asyncio.create_task(b.keys.claim(key("b"), refuse))
    await wanted.wait()
    assert not second.done()
    await a.keys.end(first, admitted=False)
    assert (await second).is_new
    await b.keys.end(await second, admitted=False)
    await a.keys.claim(key("a"), accept)
    await crash(a)
    with pytest.raises(AnotherRequest):
        await b.keys.claim(key("c"), refuse)


class AnotherRequest(Exception):
    """The key was used for another request."""


async def test_abandoned_claim_frees_its_key(
    open_ledger: LedgerOpener, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that ends while it claims the key leaves nothing."""
    a, b = [await open_ledger(url=url, data_directory=tmp_path / name) for name in "ab"]
    claim = KeyStatements(monkeypatch, "INSERT")
    task = asyncio.create_task(a.keys.claim(key("a"), accept))
    await claim.begin.wait()
    task.cancel()
    await asyncio.wait([task])
    assert (await b.keys.claim(key("b"), accept)).is_new


async def test_keys_hold_locally_during_an_outage(
    open_ledger: LedgerOpener,
    unsteady: PostgresCluster,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are flagged, logged once, sent after the outage, and then known to the other servers."""
    inserts = KeyStatements(monkeypatch, "INSERT")
    url = unsteady.new_database()
    a, b = [await open_ledger(url=url, data_directory=tmp_path / name) for name in "ab"]
    known = await a.keys.claim(key("before", digest="known"), accept)
    await admit(a, known.record)
    await a.keys.end(known, admitted=True)
    unsteady.stop()
    with caplog.at_level(logging.WARNING):
        claims = [await a.keys.claim(key(f"call {number}", digest=f"key {number}"), accept) for number in range(3)]
        again = await a.keys.claim(key("again", digest="key 0"), accept)
    assert all(claim.is_new and claim.is_local and not claim.is_shared for claim in claims)
    assert sum("hold only on this server" in record.message for record in caplog.records) == 1
    with pytest.raises(UsageUnavailable):  # the store may have it
        await a.keys.find("unknown", accept)
    opened = [await admit(a, claim.record) for claim in claims]
    found = await a.keys.find("known", accept)
    assert found is not None
    assert (found.record.request_id, found.is_local) == ("before", True)
    unsteady.start()
    await until_up(a, b)
    again = await a.keys.claim(key("again", digest="key 1"), accept)
    assert (again.record, again.is_shared) == (opened[1], True)
    async with asyncio.timeout(60):
        while (elsewhere := await b.keys.find("key 2", accept)) is None:
            await inserts.next_end()
    assert elsewhere.record == opened[2]


async def test_a_call_that_an_outage_rejects_frees_its_key(
    open_ledger: LedgerOpener, unsteady: PostgresCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store gets the rejection after the outage; until then other servers wait."""
    monkeypatch.setattr(key_store, "_HOLD_MS", 60_000)  # longer than the outage
    url, deletes = unsteady.new_database(), KeyStatements(monkeypatch, "DELETE")
    a, b = [await open_ledger(url=url, data_directory=tmp_path / name) for name in "ab"]
    claim = await a.keys.claim(key("a"), accept)
    unsteady.stop()
    await a.keys.end(claim, admitted=False)
    await deletes.next_end()
    unsteady.start()
    await until_up(a, b)
    assert (await b.keys.claim(key("b"), accept)).is_new


async def test_expired_keys_are_not_sent_after_an_outage(
    open_ledger: LedgerOpener, unsteady: PostgresCluster, tmp_path: Path
) -> None:
    """The local database has neither the key nor the mark that it must be sent."""
    ledger = await open_ledger(url=unsteady.new_database(), data_directory=tmp_path)
    unsteady.stop()
    with closing(sqlite3.connect(tmp_path / "usage.db")) as database:
        query = "SELECT (SELECT count(*) FROM idempotency_keys), (SELECT count(*) FROM unsent_keys)"
        ends = (datetime.now(UTC) + timedelta(hours=hours) for hours in (-1, 1))
        for name, expires_at in zip(("expired", "valid"), ends, strict=True):
            claim = await ledger.keys.claim(key(name, digest=name, expires_at=expires_at), accept)
            await admit(ledger, claim.record)
        assert database.execute(query).fetchone() == (2, 2)
        await ledger.keys.purge()
        assert database.execute(query).fetchone() == (1, 1)
    unsteady.start()
    await until_up(ledger)


async def test_calls_are_rejected_during_an_outage(
    open_ledger: LedgerOpener, unsteady: PostgresCluster, tmp_path: Path
) -> None:
    """With `idempotency_fallback` reject."""
    ledger = await open_ledger(url=unsteady.new_database(), data_directory=tmp_path, keys_fall_back=False)
    unsteady.stop()
    with pytest.raises(UsageUnavailable):
        await ledger.keys.claim(key("a"), accept)
    unsteady.start()
    await until_up(ledger)
    assert (await ledger.keys.claim(key("a"), accept)).is_shared


async def test_restarted_store_costs_no_call(
    open_ledger: LedgerOpener, unsteady: PostgresCluster, tmp_path: Path
) -> None:
    """The pooled connections are closed; the claim uses a new one."""
    ledger = await open_ledger(url=unsteady.new_database(), data_directory=tmp_path)
    await ledger.keys.claim(key("a"), accept)
    await ledger.keys.close(0)  # nothing uses the connections in the meantime
    unsteady.stop()
    unsteady.start()
    assert (await ledger.keys.claim(key("b", digest="other"), accept)).is_shared


async def test_a_claim_is_one_round_trip(
    open_ledger: LedgerOpener, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a new key and for a used one: the server answers once, counted on the socket."""
    monkeypatch.setattr(shared_keys, "RENEW_SECONDS", 3600)
    async with counted(url) as proxy:
        ledger = await open_ledger(url=url, data_directory=tmp_path)
        ledger.keys._shared._store = key_store.PostgresKeyStore(proxy.url)  # type: ignore[union-attr]
        first = await ledger.keys.claim(key("a", digest="first"), accept)  # connects and prepares the statement
        await ledger.keys.share(await admit(ledger, first.record))
        before = proxy.answers
        new = await ledger.keys.claim(key("b"), accept)
        assert (new.is_new, proxy.answers) == (True, before + 1)
        used = await ledger.keys.claim(key("c", digest="first"), accept)
        assert (used.record.request_id, proxy.answers) == (first.record.request_id, before + 2)
        await ledger.keys.close(0)
        await ledger.keys._shared._store.close()  # type: ignore[union-attr]
        await proxy.ended()


class CountingProxy:
    """A proxy in front of PostgreSQL that counts ReadyForQuery, the message that ends each answer of the server."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self.answers = 0
        self.url = ""
        self._connections: list[asyncio.Task[None]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection."""
        reply_reader, request_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        forwarding = asyncio.gather(self._forward(reader, request_writer), self._count(reply_reader, writer))
        self._connections.append(asyncio.current_task())  # type: ignore[arg-type]
        await forwarding

    async def ended(self) -> None:
        """Wait until all connections are closed."""
        await asyncio.gather(*self._connections)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def _count(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while kind := await reader.read(1):
            if kind == b"N":  # the answer to a request for TLS is one byte; a notice would have a length
                writer.write(kind)
                continue
            length = await reader.readexactly(4)
            writer.write(kind + length + await reader.readexactly(int.from_bytes(length) - 4))
            self.answers += kind == b"Z"
        writer.close()


@asynccontextmanager
async def counted(url: str) -> AsyncIterator[CountingProxy]:
    """Run a proxy for the body."""
    proxy = CountingProxy(url)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    proxy.url = url.replace(f":{urlsplit(url).port}/", f":{port}/") + "?sslmode=disable"
    try:
        yield proxy
    finally:
        server.close()
