"""Ledgers in data directories, alone or with databases of a private PostgreSQL cluster."""

import asyncio
import contextlib
import os
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tests.support.servers.postgres_server import PostgresCluster

from llama2_server.usage.database import create_engine
from llama2_server.usage.keys.key_store import PostgresKeyStore
from llama2_server.usage.keys.records import KeyRecord, KeyState
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.records import UsageRecord
from llama2_server.usage.schema import usage_records
from llama2_server.usage.store import Store

COSTS = {"input_tokens": Decimal("0.3672"), "output_tokens": Decimal("0.000000001")}
RECOVERY_TIMEOUT_SECONDS = 20.0
LedgerOpener = Callable[..., Awaitable[Ledger]]
_SELECT_RECORDS = sa.select(*(column.label(column.key) for column in usage_records.c if column.key != "day"))


@pytest.fixture(params=["local", "postgresql"])
def url(request: pytest.FixtureRequest) -> str | None:
    """The URL of an empty usage store; None for the local database alone."""
    if request.param == "local":
        return None
    cluster: PostgresCluster = request.getfixturevalue("postgres")
    return cluster.new_database()


@pytest.fixture
async def open_ledger(tmp_path: Path) -> AsyncIterator[LedgerOpener]:
    """Return a function that opens ledgers, by default in `tmp_path`; crash the open ones after the test."""
    ledgers = []

    async def open_one(**options: object) -> Ledger:
        url = options.pop("url", None)
        store = None if url is None else Store(str(url))
        arguments: dict[str, object] = {"data_directory": tmp_path, "neuron_costs": COSTS, "store": store, **options}
        ledger = await Ledger.open(**arguments)  # type: ignore[arg-type]
        ledgers.append(ledger)
        return ledger

    yield open_one
    for ledger in ledgers:
        await crash(ledger)


async def crash(ledger: Ledger) -> None:
    """Leave the ledger like SIGKILL after the changes that are queued: nothing is synced, forwarded or deleted."""
    if ledger._closed:
        return
    ledger._closed = True
    await ledger.keys.close(0)
    if ledger._forwarder is not None:
        await ledger._forwarder.close()
    writer: Any = ledger._writer
    writer._take, writer._tick = lambda: ([], True), lambda: None
    writer._database.close = writer._database.connection.close
    writer._jobs.put(None)
    await asyncio.to_thread(writer._thread.join)
    os.close(ledger._local._lock._descriptor)


async def stored(url: str | None, directory: Path | None = None) -> list[UsageRecord]:
    """Return all records of a store; without a URL, all records of the data directory."""
    if url is None or url.startswith("sqlite:"):
        engine = sa.create_engine(url or f"sqlite:///{directory}/usage.db", poolclass=sa.NullPool)
        with engine.connect() as connection:
            return [UsageRecord(**row) for row in connection.execute(_SELECT_RECORDS).mappings()]
    store = create_engine(url)
    async with store.connect() as reader:
        rows = (await reader.execute(_SELECT_RECORDS)).mappings().all()
    await store.dispose()
    return [UsageRecord(**row) for row in rows]


class KeyStatements:
    """Events of the statements of all servers in the key store, or of those of one kind, such as INSERT."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str = "") -> None:
        self.begin, self._end = asyncio.Event(), asyncio.Event()
        execute = PostgresKeyStore._execute

        async def execute_and_set(store: Any, statement: str, *arguments: Any, **options: Any) -> Any:
            if not statement.startswith(kind):
                return await execute(store, statement, *arguments, **options)
            self.begin.set()
            try:
                return await execute(store, statement, *arguments, **options)
            finally:
                self._end.set()

        monkeypatch.setattr(PostgresKeyStore, "_execute", execute_and_set)

    async def next_end(self) -> None:
        """Wait until a statement has ended since the last call of this method."""
        await self._end.wait()
        self._end.clear()


def key(request_id: str, digest: str = "key", **changes: object) -> KeyRecord:
    """Return the record of a call's claim."""
    record = KeyRecord(
        digest=digest,
        request_id=request_id,
        instance="server",
        state=KeyState.CLAIMED,
        seed=2**64 - 1,
        fingerprint=None,
        salt="salt",
        field_digests={"prompt": "digest"},
        expires_at=datetime.now(UTC) + timedelta(hours=1),
    )
    return replace(record, **changes)  # type: ignore[arg-type]


def accept(record: KeyRecord) -> None:
    """Accept every record as that of the request."""


async def admit(ledger: Ledger, record: KeyRecord) -> KeyRecord:
    """Admit the request of a claim, and return the key's record."""
    opened = replace(record, state=KeyState.OPEN)
    await ledger.admit(record.request_id, "acme", "model", ledger.keys.storing(opened))
    return opened


async def until_up(*ledgers: Ledger) -> None:
    """Wait until the ledgers know that the store answers."""
    async with asyncio.timeout(60):
        for ledger in ledgers:
            while not ledger.store_up:
                await ledger.probe_store()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a SQLite file against other writers for the body of the `with`."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 4 MB."""
    with mounted_disk(tmp_path / "disk") as disk:
        yield disk


@contextmanager
def mounted_disk(disk: Path, megabytes: int = 4) -> Iterator[Path]:
    """Mount a disk of this size for the body of the `with`."""
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("NOT TESTED WITH A FULL DISK: only root can mount one")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
