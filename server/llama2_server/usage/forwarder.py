"""Forward the records of the local database to the usage store, in batches.

A record that the store has accepted is deleted locally. An error of the store keeps the whole batch. Only an error of
the data itself (`StoreUnavailable.is_of_the_data`) can reject a record: if the record fails again after the store has
accepted another one, it is marked as rejected, and no longer delays later records.
"""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from datetime import date, datetime
from typing import TypeVar

from llama2_server.usage.budgets.budget import BudgetUse, Month, Reservation
from llama2_server.usage.errors import LedgerError, StoreUnavailable
from llama2_server.usage.local import statements
from llama2_server.usage.local.statements import Waiting
from llama2_server.usage.local.writer import DatabaseUnavailable, Writer
from llama2_server.usage.records import DailyUsage, UsageRecord, sum_by_day
from llama2_server.usage.store import Store, StoreState

logger = logging.getLogger(__name__)

BATCH_RECORDS = 500
BATCH_SECONDS = 0.05  # delay that collects more records into a batch
POLL_SECONDS = 1.0  # other servers and `llama2-server usage retry` can change the local database
FIRST_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 1.0
MAX_RETRIES = 20  # failed records per batch
PROBE_TIMEOUT_SECONDS = 2.0

Result = TypeVar("Result")


class Forwarder:
    """A task that forwards records; `start` creates it, and `close` ends it."""

    def __init__(self, store: Store, writer: Writer) -> None:
        self.state = StoreState()
        self._store = store
        self._writer = writer
        self._waiting = Waiting(0, 0, 0, None)
        self._new = 0  # records since `_waiting` was read
        self._migrated = False
        self._accepted = 0  # records that the store has accepted
        # Records that failed, with the number of accepted records at that time.
        self._suspects: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._urgent = asyncio.Event()
        self._round_ended = asyncio.Condition()
        self._forwarding = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    @property
    def up(self) -> bool:
        """Whether the store answered the last operation."""
        return self.state.up

    @property
    def waiting(self) -> int:
        """Number of records that wait for the store, without rejected ones."""
        return self._waiting.count + self._new

    @property
    def rejected(self) -> int:
        """Number of records that the store rejected."""
        return self._waiting.rejected

    @property
    def oldest_finished_at(self) -> datetime | None:
        """When the request of the oldest waiting record finished; None without waiting records."""
        return self._waiting.oldest_finished_at

    async def start(self) -> None:
        """Connect to the store, and start the task.

        Raises:
            LedgerError: the store cannot be used.
        """
        try:
            await self._migrate()
        except StoreUnavailable as error:
            if not error.temporary:
                raise LedgerError(f"--usage-url: {error}") from error
            self.state.record_failure(error)
        await self._refresh()
        self._task = asyncio.create_task(self._run())

    def notify(self) -> None:
        """Forward soon, because there is a new record."""
        self._new += 1
        self._changed.set()

    async def probe(self) -> None:
        """Read from the store, so that `state` is current without requests."""
        if self.waiting:  # the batches determine the state: a store can be readable and not writable
            return
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
                await self._migrate()
                await self._store.ping()
            self.state.record_success()
        except (StoreUnavailable, LedgerError, TimeoutError) as error:
            self.state.record_failure(error)

    async def flush(self, timeout_seconds: float) -> bool:
        """Wait until the store has accepted or rejected all present records; return False after the timeout."""
        try:
            async with asyncio.timeout(timeout_seconds):
                last_position = (await self._writer.read(statements.waiting)).last_position
                async with self._round_ended:
                    while await self._is_waiting(last_position):
                        self._urgent.set()
                        self._changed.set()
                        await self._round_ended.wait()
        except (TimeoutError, DatabaseUnavailable):
            return False
        return True

    async def totals(self, account_id: str, since: date | None, until: date | None) -> list[DailyUsage]:
        """Return the account's usage: the totals of the store, and the records that it did not accept.

        Raises:
            StoreUnavailable: the store does not answer.
            DatabaseUnavailable: the local database cannot be read.
        """
        if not self._suspects and not self._waiting.rejected:
            return await self._store.totals(account_id, since, until)
        async with self._forwarding:  # a record that moves now would be missing or counted twice
            try:
                totals = await self._store.totals(account_id, since, until)
            except StoreUnavailable as error:
                if not error.is_of_the_data:  # otherwise, the store cannot have the account
                    raise
                totals = []
            suspects = list(self._suspects)
            records = await self._writer.read(lambda connection: statements.records_of(connection, suspects))
        local = [
            usage
            for usage in map(DailyUsage.of, records)
            if usage.account_id == account_id
            and (since is None or usage.day >= since)
            and (until is None or usage.day <= until)
        ]
        return sum_by_day([*totals, *local])

    async def reserve(self, reservation: Reservation) -> BudgetUse | None:
        """Reserve in a budget; see `Store.reserve`. Raises LedgerError if the store cannot be migrated."""
        return await self._answer(self._store.reserve(reservation))

    async def release(self, request_id: str) -> None:
        """Delete a reservation; raises as `reserve`."""
        await self._answer(self._store.release(request_id))

    async def budget_use(self, account_id: str, month: Month) -> BudgetUse:
        """Return what an account has spent and reserved; raises as `reserve`."""
        return await self._answer(self._store.budget_use(account_id, month))

    async def close(self) -> None:
        """End the task, and close all connections to the store."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._store.close()

    async def _answer(self, operation: Coroutine[None, None, Result]) -> Result:
        """Return the store's answer to an operation; a failure shows in `state`."""
        try:
            await self._migrate()
            return await operation
        except (StoreUnavailable, LedgerError) as error:
            if not (isinstance(error, StoreUnavailable) and error.is_of_the_data):
                self.state.record_failure(error)
            raise
        finally:
            operation.close()

    async def _run(self) -> None:
        retry_seconds = FIRST_RETRY_SECONDS
        while True:
            succeeded = await self._forward()
            async with self._round_ended:
                self._round_ended.notify_all()
            if not succeeded:
                await asyncio.sleep(retry_seconds)
                retry_seconds = min(2 * retry_seconds, MAX_RETRY_SECONDS)
                continue
            retry_seconds = FIRST_RETRY_SECONDS
            if not self.waiting:
                await _wait(self._changed, POLL_SECONDS)
                self._changed.clear()
                await _wait(self._urgent, BATCH_SECONDS)
                self._urgent.clear()

    async def _forward(self) -> bool:
        """Forward one batch, and retry the failed records; return False if that must wait."""
        try:
            async with self._forwarding:
                await self._refresh()
                suspects = list(self._suspects)
                batch = await self._writer.read(
                    lambda connection: statements.oldest_records(connection, BATCH_RECORDS, suspects)
                )
                if batch:
                    await self._send(batch)
                for record in await self._to_retry(idle=not batch):
                    await self._send_one(record)
                await self._refresh()
        except (StoreUnavailable, LedgerError) as error:
            self.state.record_failure(error)
            return False
        except DatabaseUnavailable:
            return False
        except Exception:  # the task must go on; the records are still there
            logger.exception("forwarding usage records failed")
            return False
        self.state.record_success()
        return len(self._suspects) < self._waiting.count or not self._waiting.count

    async def _send(self, batch: list[UsageRecord]) -> None:
        """Write a batch, or each of its records if the data of one of them is faulty."""
        try:
            await self._upsert(batch)
        except StoreUnavailable as error:
            if not error.is_of_the_data:
                raise
            for record in batch:
                await self._send_one(record)

    async def _send_one(self, record: UsageRecord) -> None:
        try:
            await self._upsert([record])
        except StoreUnavailable as error:
            if not error.is_of_the_data:
                raise
            await self._suspect(record.request_id, error)

    async def _suspect(self, request_id: str, error: StoreUnavailable) -> None:
        accepted_before = self._suspects.pop(request_id, self._accepted)
        if self._accepted <= accepted_before:
            self._suspects[request_id] = accepted_before  # at the end, so that the others are retried first
            return
        await self._writer.run(lambda connection: statements.reject(connection, request_id, error.sqlstate))
        logger.error("the usage store rejected the record of request %s (SQLSTATE %s)", request_id, error.sqlstate)

    async def _upsert(self, records: list[UsageRecord]) -> None:
        await self._migrate()
        await self._store.upsert(records)
        await self._writer.run(lambda connection: statements.delete_forwarded(connection, records))
        self._accepted += len(records)
        for record in records:
            self._suspects.pop(record.request_id, None)

    async def _to_retry(self, *, idle: bool) -> list[UsageRecord]:
        """Return failed records: those older than the last accepted record, and without other records the oldest."""
        ids = [one for one, accepted in self._suspects.items() if idle or self._accepted > accepted][:MAX_RETRIES]
        if not ids:
            return []
        records = await self._writer.read(lambda connection: statements.records_of(connection, ids))
        return [record for record in records if record.request_id in ids]

    async def _is_waiting(self, last_position: int) -> bool:
        suspects: Sequence[str] = list(self._suspects)
        return await self._writer.read(lambda connection: statements.is_waiting(connection, last_position, suspects))

    async def _refresh(self) -> None:
        self._waiting = await self._writer.read(statements.waiting)
        self._new = 0  # the commits before the read have called `notify` before its result arrived

    async def _migrate(self) -> None:
        if not self._migrated:
            await self._store.migrate()
            self._migrated = True


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set, at most this long."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
