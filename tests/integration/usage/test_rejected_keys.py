"""Idempotency keys in PostgreSQL whose calls were rejected, while the store or a server is slow."""

import asyncio
from pathlib import Path

import pytest
from tests.integration.usage.conftest import KeyStatements, LedgerOpener, accept, admit, key, until_up
from tests.support.servers.postgres_server import PostgresCluster

from llama2_server.usage.errors import StoreUnavailable
from llama2_server.usage.keys import key_store, shared_keys
from llama2_server.usage.keys.key_store import PostgresKeyStore
from llama2_server.usage.keys.records import Claim
from llama2_server.usage.ledger import Ledger


@pytest.fixture(autouse=True)
def short_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let servers hold keys for a short time, and never renew them."""
    monkeypatch.setattr(shared_keys, "RENEW_SECONDS", 3600)
    monkeypatch.setattr(key_store, "_HOLD_MS", 500)


@pytest.fixture
def url(postgres: PostgresCluster) -> str:
    """The URL of an empty usage store."""
    return postgres.new_database()


async def test_a_late_rejection_keeps_the_key_of_another_server(
    open_ledger: LedgerOpener, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server whose hold has expired rejects its call; the other server continues that call, so it is not deleted."""
    a, b = [await open_ledger(url=url, data_directory=tmp_path / name) for name in "ab"]
    rejected = await a.keys.claim(key("a"), accept)
    continued = await b.keys.claim(key("b"), accept)
    assert (continued.record.request_id, continued.is_new) == ("a", False)
    deletes, inserts = KeyStatements(monkeypatch, "DELETE"), KeyStatements(monkeypatch, "INSERT")
    await a.keys.end(rejected, admitted=False)
    await deletes.next_end()
    waiting = asyncio.create_task(a.keys.claim(key("c"), accept))
    await inserts.next_end()
    await admit(b, continued.record)
    await b.keys.end(continued, admitted=True)
    again = await waiting
    assert (again.record.request_id, again.is_new) == ("a", False)


async def test_a_failed_rejection_is_not_repeated_after_the_next_call(
    open_ledger: LedgerOpener, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repetition would delete the key of a call that has a usage record, and the key would name a second call."""
    a, b, c = [await open_ledger(url=url, data_directory=tmp_path / name) for name in "abc"]
    rejected = await a.keys.claim(key("a"), accept)
    await _end_without_store(monkeypatch, "withdraw", a, rejected, admitted=False)
    at_b = await b.keys.claim(key("b"), accept)
    await admit(b, at_b.record)
    await b.keys.end(at_b, admitted=True)
    at_a = await a.keys.claim(key("c"), accept)
    assert (at_a.record.request_id, at_a.is_new) == ("a", False)
    await admit(a, at_a.record)
    await _end_without_store(monkeypatch, "put", a, at_a, admitted=True)
    await _shared(a)._round()
    await _endings(a)
    again = await c.keys.claim(key("d"), accept)
    assert (again.record.request_id, again.is_new) == ("a", False)


async def _end_without_store(
    monkeypatch: pytest.MonkeyPatch, method: str, ledger: Ledger, claim: Claim, *, admitted: bool
) -> None:
    """End the work on a key while the store does not accept the end."""

    async def fail(*_: object, **__: object) -> None:
        raise StoreUnavailable("connection refused", temporary=True)

    with monkeypatch.context() as patch:
        patch.setattr(PostgresKeyStore, method, fail)
        await ledger.keys.end(claim, admitted=admitted)
        await _endings(ledger)
    await until_up(ledger)


async def _endings(ledger: Ledger) -> None:
    await asyncio.gather(*_shared(ledger)._endings.values())


def _shared(ledger: Ledger) -> shared_keys.SharedKeys:
    assert ledger.keys._shared is not None
    return ledger.keys._shared
