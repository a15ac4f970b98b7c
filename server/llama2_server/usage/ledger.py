"""Usage ledger: exactly one durable record per admitted request, however it ends.

The steps of a request are `admit`, `progress` from time to time, and `finish`. Each writes an entry to the journal. A
background task copies the records to the usage store in batches, so that no token waits for the store.

`finish` returns after the record is in the journal. The journal keeps the record until the store has committed it. The
store ignores records with known request ids, so a batch that is written twice counts once.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Self

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llama2_server.errors import UsageUnavailable
from llama2_server.usage.errors import LedgerError, StoreUnavailable
from llama2_server.usage.journal.journal import Journal
from llama2_server.usage.pricing import TokenUsage
from llama2_server.usage.records import DailyUsage, RunningRequest, UsageRecord
from llama2_server.usage.schema import NEURON_DECIMALS
from llama2_server.usage.store import Store
from llama2_server.usage.store_state import StoreState

logger = logging.getLogger(__name__)

JOURNAL_LIMIT_BYTES = 16 * 1024 * 1024
BATCH_RECORDS = 500
BATCH_SECONDS = 0.05  # delay that collects more records into a batch
SYNC_SECONDS = 1.0  # a power failure loses at most this much
FIRST_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 1.0
PROBE_TIMEOUT_SECONDS = 2.0
READ_FLUSH_TIMEOUT_SECONDS = 2.0  # how long a reader waits for the latest records
CLOSE_TIMEOUT_SECONDS = 5.0


def default_file(data_directory: Path) -> Path:
    """Return the SQLite file of the default usage store."""
    return data_directory / "usage.db"


def default_url(data_directory: Path) -> str:
    """Return the URL of the default usage store."""
    return f"sqlite:///{default_file(data_directory)}"


async def read_totals(
    url: str, account_id: str | None = None, since: date | None = None, until: date | None = None
) -> list[DailyUsage]:
    """Return the usage of one account, or of all with None, for the operator; servers may run at the same time.

    Raises:
        LedgerError: the store cannot be read.
    """
    store = Store(url)
    try:
        await store.migrate()
        return await store.totals(account_id, since, until)
    except StoreUnavailable as error:
        raise LedgerError(f"--usage-url: {error}") from error
    finally:
        await store.close()


class Ledger(Collector):
    """The usage ledger of one server: `open` creates it, and `close` closes it.

    A call of a request takes no longer than a small write to the journal.
    """

    def __init__(
        self, store: Store, journal: Journal, neuron_costs: Mapping[str, Decimal], now: Callable[[], datetime]
    ) -> None:
        self._store = store
        self._journal = journal
        self._neuron_costs = neuron_costs
        self._now = now
        self._migrated = False
        self._store_state = StoreState()
        self._finished = journal.pending
        self._stored = 0
        self._changed = asyncio.Event()
        self._batch_stored = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def open(
        cls,
        *,
        data_directory: Path,
        neuron_costs: Mapping[str, Decimal],
        store: Store | None = None,
        journal_limit_bytes: int = JOURNAL_LIMIT_BYTES,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> Self:
        """Migrate the store, and recover the journals of killed servers; their requests are marked INTERRUPTED.

        Without a store, the ledger is a SQLite file in the data directory.

        If the store is temporarily unavailable, the ledger opens, and records wait in the journal.

        Raises:
            LedgerError: the store, the prices or the directory cannot be used.
        """
        _check_prices(neuron_costs)
        try:
            journal = await asyncio.to_thread(Journal.open, data_directory / "journal", journal_limit_bytes)
        except OSError as error:
            raise LedgerError(f"--data-directory: {data_directory}: {error.strerror}") from error
        ledger = cls(store or Store(default_url(data_directory)), journal, neuron_costs, now)
        try:
            await ledger._start()
        except BaseException:
            await ledger.close(0)
            raise
        return ledger

    @property
    def pending(self) -> int:
        """Number of records that are not in the store yet."""
        return self._journal.pending

    @property
    def journal_bytes(self) -> int:
        """Size of the journal on disk."""
        return self._journal.size

    @property
    def store_up(self) -> bool:
        """Whether the store answered the last operation."""
        return self._store_state.up

    @property
    def disk_writable(self) -> bool:
        """Whether the journal's disk accepts records."""
        return self._journal.writable

    @property
    def lag_seconds(self) -> float:
        """Time since the request of the oldest pending record finished; 0 without pending records."""
        oldest = self._journal.oldest_finished_at
        return 0.0 if oldest is None else max(0.0, (self._now() - oldest).total_seconds())

    def collect(self) -> Iterator[Metric]:
        """Yield the ledger's metrics, on the scrape thread."""
        for name, documentation, value in (
            ("lag_seconds", "Age of the oldest record that is not in the usage store yet, or 0.", self.lag_seconds),
            ("pending_records", "Number of usage records that are not in the usage store yet.", self.pending),
            ("journal_bytes", "Size of the usage journal on disk.", self.journal_bytes),
            ("store_up", "1 if the usage store answered the last operation, else 0.", self.store_up),
            ("disk_writable", "1 if the disk of the usage journal accepts records, else 0.", self.disk_writable),
        ):
            yield GaugeMetricFamily(f"llama2_usage_{name}", documentation, value)

    async def probe_store(self) -> None:
        """Read from the store, so that `store_up` is current without requests."""
        if self._journal.pending:  # the batches determine the state: a store can be readable and not writable
            return
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
                await self._migrate()
                await self._store.ping()
            self._store_state.record_success()
        except (StoreUnavailable, LedgerError, TimeoutError) as error:
            self._store_state.record_failure(error)

    async def probe_disk(self) -> None:
        """Check the free space, so that `disk_writable` is current without requests."""
        await asyncio.to_thread(self._journal.probe_disk)

    def check_capacity(self, request_id: str, account_id: str, model: str) -> None:
        """Check that the journal has space for a request, before anything is counted for it.

        Raises:
            UsageJournalFull: the journal is full; `admit` may still raise it if other requests take the space.
        """
        self._journal.check_capacity(RunningRequest(request_id, account_id, model, self._now(), self._neuron_costs))

    def admit(self, request_id: str, account_id: str, model: str) -> None:
        """Admit a request: from now on it has exactly one record, and the caller must call `finish`.

        Raises:
            UsageJournalFull: the journal is full, because the store has been unavailable for long.
        """
        self._journal.admit(RunningRequest(request_id, account_id, model, self._now(), self._neuron_costs))

    def progress(self, request_id: str, tokens: TokenUsage) -> None:
        """Report the tokens computed so far; call it for every token, from any thread, because most calls are cheap."""
        self._journal.progress(request_id, tokens)

    def finish(self, request_id: str, outcome: str, tokens: TokenUsage, *, cached: bool = False) -> UsageRecord | None:
        """Write and return the record of a finished request; never fail, and never wait for the store.

        Call it once, on the event loop; a second call changes nothing and returns None.
        """
        record = self._journal.finish(request_id, outcome, tokens, self._now(), cached=cached)
        self._finished = self._stored + self._journal.pending
        self._changed.set()
        return record

    async def totals(self, account_id: str, since: date | None = None, until: date | None = None) -> list[DailyUsage]:
        """Return the account's usage by day in UTC and model; both days are included, None means no limit.

        The usage includes every request that this server finished before the call.

        Raises:
            UsageUnavailable: the store does not answer.
        """
        try:
            if not await self.flush(READ_FLUSH_TIMEOUT_SECONDS):
                raise UsageUnavailable
            return await self._store.totals(account_id, since, until)
        except StoreUnavailable as error:
            logger.warning("usage cannot be read: %s", error)
            raise UsageUnavailable from error

    async def flush(self, timeout_seconds: float) -> bool:
        """Wait until the store has all present records; return False after the timeout."""
        target = self._finished
        self._changed.set()
        try:
            async with asyncio.timeout(timeout_seconds), self._batch_stored:
                await self._batch_stored.wait_for(lambda: self._stored >= target)
        except TimeoutError:
            return False
        return True

    async def close(self, timeout_seconds: float = CLOSE_TIMEOUT_SECONDS) -> None:
        """Store the records for up to `timeout_seconds`; the others stay in the journal until the next start."""
        if self._tasks and not await self.flush(timeout_seconds):
            logger.warning("%d usage records stay in the journal until the next start", self.pending)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await asyncio.to_thread(self._journal.sync)
        self._journal.release()
        await self._store.close()

    async def _start(self) -> None:
        try:
            await self._migrate()
        except StoreUnavailable as error:
            if not error.temporary:
                raise LedgerError(f"--usage-url: {error}") from error
            self._store_state.record_failure(error)
        self._tasks = [asyncio.create_task(self._flush_forever()), asyncio.create_task(self._sync_forever())]
        self._changed.set()

    async def _migrate(self) -> None:
        if not self._migrated:
            await self._store.migrate()
            self._migrated = True

    async def _flush_forever(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await asyncio.sleep(BATCH_SECONDS)
            while self._journal.pending:
                await self._flush_batch()

    async def _flush_batch(self) -> None:
        """Store the oldest records; retry until that succeeds."""
        batch, retry_seconds = self._journal.oldest(BATCH_RECORDS), FIRST_RETRY_SECONDS
        while not await self._insert(batch):
            await asyncio.sleep(retry_seconds)
            retry_seconds = min(2 * retry_seconds, MAX_RETRY_SECONDS)
        self._journal.settle(len(batch))
        self._stored += len(batch)
        async with self._batch_stored:
            self._batch_stored.notify_all()

    async def _insert(self, batch: list[UsageRecord]) -> bool:
        try:
            await self._migrate()
            await self._store.insert(batch)
        except (StoreUnavailable, LedgerError) as error:
            self._store_state.record_failure(error)
            return False
        self._store_state.record_success()
        return True

    async def _sync_forever(self) -> None:
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            await asyncio.to_thread(self._journal.sync)


def _check_prices(neuron_costs: Mapping[str, Decimal]) -> None:
    for metric, cost in neuron_costs.items():
        if cost.scaleb(NEURON_DECIMALS) % 1:
            raise LedgerError(f"neuron_cost of {metric}: {cost} has more than {NEURON_DECIMALS} decimals; round it")
