"""The servers that cut streams are read from: real processes, which restart on their data directory."""

import asyncio
import contextlib
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc.aio
from tests.integration.usage.conftest import stored
from tests.reliability.cuts.costs import Bill
from tests.support.forks import ForkedServer, Forks

from llama2.v1 import model_pb2, model_pb2_grpc
from llama2_server.usage.keys.records import KeyState
from llama2_server.usage.local.local_ledger import file_of

STEP_SECONDS = 0.004
"""Delay of each decode step, so that clients read most tokens as deltas of their own."""
POLL_SECONDS = 0.005


@dataclass
class CutServer:
    """One server; its address changes when it restarts."""

    forks: Forks
    data_directory: Path
    flags: Sequence[str]
    charges: Path
    """File that gets a line for each quota unit that a server consumes or gives back."""
    replicas: list["CutServer"] = field(default_factory=list, repr=False)
    """All servers with the same usage store, this one included."""
    address: str = ""
    _process: ForkedServer | None = None
    _up: asyncio.Event = field(default_factory=asyncio.Event)
    _opening: Counter[str] = field(default_factory=Counter)

    async def start(self) -> None:
        """Start a process, and return when it serves."""
        self._process = await asyncio.to_thread(
            self.forks.start, self.data_directory, *self.flags, step_seconds=STEP_SECONDS, charges=self.charges
        )
        self.address = self._process.address
        self._up.set()

    async def wait_for_fingerprint(self) -> None:
        """Wait until the weights are hashed: before that, no reply can be computed again after a restart."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub: Any = model_pb2_grpc.ModelServiceStub(channel)
            while not (await stub.GetModelCard(model_pb2.GetModelCardRequest())).execution.fingerprint:
                await asyncio.sleep(POLL_SECONDS)

    async def stop(self) -> int:
        """Stop the process by SIGTERM, and return its exit code; 0 if a restart that was cancelled has ended it."""
        process, self._process = self._process, None
        return 0 if process is None else await asyncio.to_thread(process.stop)

    async def restart(self, *, kills: bool) -> int | None:
        """End the process by SIGKILL or SIGTERM, and start another one; None if it restarts already.

        Returns:
            The exit code of the ended process.
        """
        if not self._up.is_set():
            return None
        self._up.clear()
        if not kills:
            code = await self.stop()
        else:
            # A server that is killed between the quota and the record loses the unit, which counts here nevertheless.
            while not all(self.is_open(digest) for digest in list(self._opening)):
                await asyncio.sleep(POLL_SECONDS)
            process, self._process = self._process, None
            assert process is not None
            process.kill()
            code = await asyncio.to_thread(process.wait)
        await self.start()
        return code

    @contextmanager
    def opening(self, digest: str) -> Iterator[None]:
        """During the body, kill the server only if the key has a usage record."""
        self._opening[digest] += 1
        try:
            yield
        finally:
            self._opening[digest] -= 1
            self._opening += Counter()  # without the zeros

    async def wait_until_up(self) -> None:
        """Wait until no restart is in progress."""
        await self._up.wait()

    def is_open(self, digest: str) -> bool:
        """Return whether a call of the key has a usage record on any replica."""
        return any(_state(one.data_directory, digest) >= KeyState.OPEN for one in self.replicas)


def units_by_account(charges: Path) -> Counter[str]:
    """Return the consumed quota units that were not given back."""
    units: Counter[str] = Counter()
    for line in charges.read_text(encoding="utf-8").splitlines():
        change, _, account = line.partition(" ")
        units[account] += int(change)
    return units


async def records_by_account(url: str | None, data_directory: Path) -> dict[str, list[Bill]]:
    """Return the usage records of the store, or without one of the data directory."""
    records: defaultdict[str, list[Bill]] = defaultdict(list)
    for one in await stored(url, data_directory):
        price = Decimal(one.neurons)
        records[one.account_id].append(Bill(one.request_id, one.input_tokens, one.output_tokens, price))
    return records


def _state(data_directory: Path, digest: str) -> int:
    path = f"file:{file_of(data_directory)}?mode=ro"
    with contextlib.closing(sqlite3.connect(path, uri=True)) as connection:
        row = connection.execute("SELECT state FROM idempotency_keys WHERE digest = ?", (digest,)).fetchone()
    return -1 if row is None else int(row[0])
