"""Usage ledger: exactly one durable record per admitted request, however it ends.

The steps of a request are `admit`, `progress` from time to time, and `finish`. They change the local database, an
SQLite file in the data directory, on the writer's thread. `commit` waits until the changes are durable, so that no
reply is complete without its record.

Without a usage store, the local database is the ledger. With one, the forwarder copies the records to the store, off
the path of the calls, and deletes them locally.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Self, TypeVar

from llama2_server.errors import UsageUnavailable
from llama2_server.usage.budgets.budget import BudgetOf, BudgetState, BudgetUse
from llama2_server.usage.budgets.budgets import Budgets
from llama2_server.usage.errors import LedgerError, StoreUnavailable
from llama2_server.usage.forwarder import Forwarder
from llama2_server.usage.keys.key_ledger import KeyLedger
from llama2_server.usage.keys.local_keys import LocalKeys
from llama2_server.usage.keys.shared_keys import SharedKeys
from llama2_server.usage.local import statements
from llama2_server.usage.local.local_ledger import LocalLedger
from llama2_server.usage.local.writer import Change, DatabaseUnavailable, Writer, both, no_change
from llama2_server.usage.pricing import TokenUsage
from llama2_server.usage.records import DailyUsage, RunningRequest, UsageRecord
from llama2_server.usage.schema import check_prices
from llama2_server.usage.store import Store

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_PENDING_RECORDS = 100_000
PROGRESS_TOKENS = 16
"""Upper bound (exclusive) of the output tokens of a running request that a SIGKILL loses."""
READ_FLUSH_TIMEOUT_SECONDS = 2.0  # how long a reader waits for the latest records
CLOSE_TIMEOUT_SECONDS = 5.0
_NOT_RECORDED = "usage cannot be recorded now; retry"
_NOT_READ = "usage cannot be read now; retry"


class Ledger:
    """The usage ledger of one server: `open` creates it, and `close` closes it. Use it on one event loop."""

    def __init__(
        self,
        local: LocalLedger,
        store: Store | None,
        neuron_costs: Mapping[str, Decimal],
        max_pending_records: int,
        now: Callable[[], datetime],
        budget_of: BudgetOf,
        keys_fall_back: bool,
    ) -> None:
        self._local = local
        self._writer = Writer(local.database)
        self._forwarder = None if store is None else Forwarder(store, self._writer)
        local_keys = LocalKeys(self._writer, local.instance, now)
        shared_keys = None
        if store is not None and self._forwarder is not None:
            shared_keys = SharedKeys(store.keys, self._forwarder.state, self._writer, local.instance, now)
        self.keys = KeyLedger(local_keys, shared_keys, self._writer, falls_back=keys_fall_back)
        """The idempotency keys of requests."""
        self._neuron_costs = neuron_costs
        self._budgets = Budgets(budget_of, neuron_costs, now, self._writer.read, self._forwarder)
        self._max_pending_records = max_pending_records
        self._now = now
        self._running: dict[str, RunningRequest] = {}
        self._uncommitted: dict[str, UsageRecord] = {}  # by request id, oldest first
        self._committed = asyncio.Event()
        self._closed = False

    @classmethod
    async def open(
        cls,
        *,
        data_directory: Path,
        neuron_costs: Mapping[str, Decimal],
        store: Store | None = None,
        max_pending_records: int = MAX_PENDING_RECORDS,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        budget_of: BudgetOf = lambda account_id: None,
        keys_fall_back: bool = True,
    ) -> Self:
        """Open the local database, and mark the running requests of killed servers as INTERRUPTED.

        If the store is temporarily unavailable, the ledger opens, and records wait in the local database.

        Raises:
            LedgerError: the store, the prices or the directory cannot be used.
        """
        check_prices(neuron_costs)
        local = await asyncio.to_thread(LocalLedger.open, data_directory)
        ledger = cls(local, store, neuron_costs, max_pending_records, now, budget_of, keys_fall_back)
        try:
            if ledger._forwarder is not None:
                await ledger._forwarder.start()
                ledger.keys.start(local.ended)
        except BaseException:
            await ledger.close(0)
            raise
        return ledger

    @property
    def pending(self) -> int:
        """Number of records that are not in their final store yet, without rejected ones."""
        return len(self._uncommitted) + (0 if self._forwarder is None else self._forwarder.waiting)

    @property
    def rejected(self) -> int:
        """Number of records that the store rejected."""
        return 0 if self._forwarder is None else self._forwarder.rejected

    @property
    def store_up(self) -> bool:
        """Whether the store answered the last operation; True without a store."""
        return self._forwarder is None or self._forwarder.state.up

    @property
    def disk_writable(self) -> bool:
        """Whether the local database accepts records."""
        return self._writer.writable

    @property
    def database_bytes(self) -> int:
        """Size of the local database on disk."""
        return self._writer.size

    @property
    def lag_seconds(self) -> float:
        """Time since the request of the oldest pending record finished; 0 without pending records."""
        oldest = None if self._forwarder is None else self._forwarder.oldest_finished_at
        if oldest is None:
            oldest = next((record.finished_at for record in list(self._uncommitted.values())), None)
        return 0.0 if oldest is None else max(0.0, (self._now() - oldest).total_seconds())

    async def probe_store(self) -> None:
        """Read from the store, so that `store_up` is current without requests."""
        if self._forwarder is not None:
            await self._forwarder.probe()

    async def probe_disk(self) -> None:
        """Check the local database and its disk, so that `disk_writable` is current without requests."""
        await self._writer.probe()

    def check_capacity(self) -> None:
        """Check that a request can be recorded, before anything is counted for it.

        Raises:
            UsageUnavailable: it cannot; `admit` may still raise it if other requests take the space.
        """
        if not self._writer.writable or self.pending + len(self._running) >= self._max_pending_records:
            raise UsageUnavailable(_NOT_RECORDED)

    def reserved(
        self, request_id: str, account_id: str, model: str, most: TokenUsage
    ) -> AbstractAsyncContextManager[None]:
        """Reserve the price of the most tokens that a request can compute in its account's budget, if it has one.

        The body calls `admit` and `finish`. If it does not call `admit`, the request leaves neither a record nor a
        reservation. An account without a budget awaits nothing.

        Raises:
            BudgetExhausted: the price does not fit into the budget.
            UsageUnavailable: the request cannot be recorded, or the usage store does not answer.
        """
        request = RunningRequest(request_id, account_id, model, self._now(), self._neuron_costs)
        return self._budgets.reserved(request, most, self)

    async def admit(self, request_id: str, account_id: str, model: str, also: Change = no_change) -> None:
        """Admit a request: after the return it has exactly one record. The caller must call `finish`, also if it fails.

        A finished request can be admitted again, and continues its record. `also` changes the database in the same
        transaction.

        Raises:
            UsageUnavailable: the disk or the store has not accepted records for long, so the request has no record.
        """
        if (reserved := self._running.get(request_id)) is not None:
            reserved.admitted = True
            await self._run(also)
            return
        request = RunningRequest(request_id, account_id, model, self._now(), self._neuron_costs, admitted=True)
        await self.start(request, also=also)

    async def start(
        self,
        request: RunningRequest,
        reserve: Callable[[sqlite3.Connection], BudgetUse | None] = lambda _: None,
        also: Change = no_change,
    ) -> BudgetUse | None:
        """Commit a running request, unless `reserve` returns an exceeded budget in the same transaction; return it.

        Raises:
            UsageUnavailable: it cannot be stored.
        """
        self.check_capacity()
        self._running[request.request_id] = request
        try:
            exceeded = await self._run(lambda connection: self._insert(connection, request, reserve, also))
        except UsageUnavailable:
            self._running.pop(request.request_id, None)
            raise
        if exceeded is not None:
            self._running.pop(request.request_id, None)
        return exceeded

    async def budget(self, account_id: str) -> BudgetState | None:
        """Return the state of the account's budget in this month; None without a budget.

        Raises:
            UsageUnavailable: the store does not answer, or the disk cannot be read.
        """
        try:
            return await self._budgets.state(account_id)
        except (StoreUnavailable, LedgerError, DatabaseUnavailable) as error:
            logger.warning("a budget cannot be read: %s", error)
            raise UsageUnavailable(_NOT_READ) from error

    def progress(self, request_id: str, tokens: TokenUsage) -> None:
        """Report the tokens computed so far; call it for every token, from any thread, because most calls are cheap.

        The tokens are stored after the prefill, and then every PROGRESS_TOKENS.
        """
        request = self._running.get(request_id)
        if request is None:
            return  # it has finished in the meantime
        new_tokens = tokens.output_tokens - request.tokens.output_tokens
        if new_tokens < PROGRESS_TOKENS and tokens.input_tokens == request.tokens.input_tokens:
            return
        request.tokens, now = tokens, self._now()
        self._writer.submit(lambda connection: statements.progress(connection, request_id, tokens, now))

    def finish(
        self,
        request_id: str,
        outcome: str,
        tokens: TokenUsage,
        *,
        cached: bool = False,
        also: Change = no_change,
    ) -> UsageRecord | None:
        """Write the record of a finished request; never fail, and never wait. `commit` waits.

        Call it once, on the event loop. A second call changes nothing and returns None, like a call for a request that
        `admit` rejected. `also` changes the database in the same transaction.
        """
        request = self._running.pop(request_id, None)
        if request is None:
            return None
        record = request.finish(outcome, tokens, self._now(), cached=cached)
        self._uncommitted[request_id] = record
        committed = self._writer.keep(both(lambda connection: statements.finish(connection, record), also))
        committed.add_done_callback(lambda _: self._on_commit(request_id))
        return record

    def withdraw(self, request_id: str, also: Change = no_change) -> None:
        """End a request that was rejected after all, without a record of this attempt."""
        if (request := self._running.pop(request_id, None)) is not None:
            request.admitted = False  # `reserved` ends a reservation in the store
            withdraw = both(lambda connection: statements.withdraw(connection, request_id), also)
            self._writer.submit(withdraw, keep=True)

    async def commit(self) -> None:
        """Wait until the records of all finished requests are durable, or wait in memory because the disk is full."""
        await self._writer.attempted()

    async def totals(self, account_id: str, since: date | None = None, until: date | None = None) -> list[DailyUsage]:
        """Return the account's usage by day in UTC and model; both days are included, None means no limit.

        The usage includes every request that this server finished before the call.

        Raises:
            UsageUnavailable: the store does not answer, or records wait for the disk.
        """
        try:
            if not await self.flush(READ_FLUSH_TIMEOUT_SECONDS):
                raise UsageUnavailable(_NOT_READ)
            if self._forwarder is not None:
                return await self._forwarder.totals(account_id, since, until)
            return await self._writer.read(lambda connection: statements.totals(connection, account_id, since, until))
        except (StoreUnavailable, DatabaseUnavailable) as error:
            logger.warning("usage cannot be read: %s", error)
            raise UsageUnavailable(_NOT_READ) from error

    async def flush(self, timeout_seconds: float) -> bool:
        """Wait until the final store has all present records or has rejected them; return False after the timeout."""
        present = set(self._uncommitted)
        try:
            async with asyncio.timeout(timeout_seconds) as timeout:
                while not present.isdisjoint(self._uncommitted):
                    self._committed.clear()
                    await self._committed.wait()
        except TimeoutError:
            return False
        if self._forwarder is None:
            return True
        deadline = timeout.when()
        left = timeout_seconds if deadline is None else deadline - asyncio.get_running_loop().time()
        return await self._forwarder.flush(left)

    async def close(self, timeout_seconds: float = CLOSE_TIMEOUT_SECONDS) -> None:
        """Forward the records for up to `timeout_seconds`; the others stay in the local database."""
        if self._closed:
            return
        self._closed = True
        await self.keys.close(timeout_seconds)
        if self._forwarder is not None:
            if timeout_seconds and not await self.flush(timeout_seconds):
                logger.warning("%d usage records stay in the data directory until the next start", self.pending)
            await self._forwarder.close()
        await self._writer.close()
        self._local.release()

    async def _run(self, change: Callable[[sqlite3.Connection], Result]) -> Result:
        try:
            return await self._writer.run(change)
        except DatabaseUnavailable as error:
            raise UsageUnavailable(_NOT_RECORDED) from error

    def _insert(
        self,
        connection: sqlite3.Connection,
        request: RunningRequest,
        reserve: Callable[[sqlite3.Connection], BudgetUse | None],
        also: Change,
    ) -> BudgetUse | None:
        if not self._local.database.in_place:
            raise DatabaseUnavailable("another file has replaced the usage database")
        exceeded = reserve(connection)
        if exceeded is None:
            statements.admit(connection, request, self._local.instance)
            also(connection)
        return exceeded

    def _on_commit(self, request_id: str) -> None:
        self._uncommitted.pop(request_id, None)
        self._committed.set()
        if self._forwarder is not None:
            self._forwarder.notify()
