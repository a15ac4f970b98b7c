"""The usage ledger: exactly one durable record per admitted request, whatever its end.

admit -> progress, now and then -> finish, each a line in the journal -> the store, in batches, off the token path.

A record is in the journal before `finish` returns, and leaves it when the store has committed it. The store ignores a
record whose request id it has, so that a batch may be written twice and counts once.
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

logger = logging.getLogger(__name__)

JOURNAL_LIMIT_BYTES = 16 * 1024 * 1024
BATCH_RECORDS = 500
BATCH_SECONDS = 0.05  # what a record waits for company
SYNC_SECONDS = 1.0  # what a power failure loses at most
FIRST_RETRY_SECONDS = 0.1
LAST_RETRY_SECONDS = 5.0
READ_FLUSH_TIMEOUT_SECONDS = 2.0  # what a reader waits for the records of a moment ago
CLOSE_SECONDS = 5.0


def default_file(data_directory: Path) -> Path:
    """The SQLite file of the store where the operator names none."""
    return data_directory / "usage.db"


def default_url(data_directory: Path) -> str:
    """The store where the operator names none."""
    return f"sqlite:///{default_file(data_directory)}"


async def read_totals(
    url: str, account_id: str | None = None, since: date | None = None, until: date | None = None
) -> list[DailyUsage]:
    """What the store has, for the operator, beside servers that run: one account's usage, or with None everybody's.

    Raises:
        LedgerError: the store cannot be read.
    """
    store = Store(url)
    try:
        await store.migrate()
        return await store.totals(account_id, since, until)
    except StoreUnavailable as error:
        raise LedgerError(f"usage_url: {error}") from error
    finally:
        await store.close()


class Ledger(Collector):
    """Takes no longer than a small write for a request's call; `open` makes one, and `close` ends it."""

    def __init__(
        self, store: Store, journal: Journal, neuron_costs: Mapping[str, Decimal], now: Callable[[], datetime]
    ) -> None:
        self._store = store
        self._journal = journal
        self._neuron_costs = neuron_costs
        self._now = now
        self._migrated = False
        self._is_down = False
        self._taken = journal.pending
        self._settled = 0
        self._news = asyncio.Event()
        self._progress = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def open(
        cls,
        *,
        data_directory: Path,
        neuron_costs: Mapping[str, Decimal],
        url: str | None = None,
        journal_limit_bytes: int = JOURNAL_LIMIT_BYTES,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> Self:
        """Migrate the store and take over the journals of servers that were killed, as records marked INTERRUPTED.

        A store that is down for the moment does not hinder the start: records wait for it in the journal.

        Raises:
            LedgerError: the URL, the store's answer, the prices or the directory make a ledger impossible.
        """
        _check_prices(neuron_costs)
        try:
            journal = await asyncio.to_thread(Journal.open, data_directory / "journal", journal_limit_bytes)
        except OSError as error:
            raise LedgerError(f"data_directory: {data_directory}: {error.strerror}") from error
        try:
            ledger = cls(Store(url or default_url(data_directory)), journal, neuron_costs, now)
        except LedgerError:
            journal.release()
            raise
        try:
            await ledger._start()
        except BaseException:
            await ledger.close(0)
            raise
        return ledger

    @property
    def pending(self) -> int:
        """Records that the store does not have yet."""
        return self._journal.pending

    @property
    def journal_bytes(self) -> int:
        """The journal's size on the disk."""
        return self._journal.size

    @property
    def lag_seconds(self) -> float:
        """How long ago the request ended whose record has waited longest for the store; 0 if none waits."""
        oldest = self._journal.oldest_finished_at
        return 0.0 if oldest is None else max(0.0, (self._now() - oldest).total_seconds())

    def collect(self) -> Iterator[Metric]:
        """Yield the ledger's metrics, on the scrape thread."""
        lag = "Age of the oldest usage record that is not in the usage store yet; 0 if there is none."
        yield GaugeMetricFamily("llama2_usage_lag_seconds", lag, self.lag_seconds)
        pending = "Number of usage records that are not in the usage store yet."
        yield GaugeMetricFamily("llama2_usage_pending_records", pending, self.pending)
        yield GaugeMetricFamily("llama2_usage_journal_bytes", "Size of the usage journal on disk.", self.journal_bytes)

    def check_capacity(self, request_id: str, account_id: str, model: str) -> None:
        """Look whether there is room to admit a request, before anything is counted for it.

        Raises:
            UsageJournalFull: as `admit`, which may still raise it when others were quicker.
        """
        self._journal.check_capacity(RunningRequest(request_id, account_id, model, self._now(), self._neuron_costs))

    def admit(self, request_id: str, account_id: str, model: str) -> None:
        """From here on the request has exactly one record, and `finish` has to be called.

        Raises:
            UsageJournalFull: the journal has no room: the store has been down for long.
        """
        self._journal.admit(RunningRequest(request_id, account_id, model, self._now(), self._neuron_costs))

    def progress(self, request_id: str, tokens: TokenUsage) -> None:
        """What has been computed so far; call it for every token, from any thread: most calls do next to nothing."""
        self._journal.progress(request_id, tokens)

    def finish(self, request_id: str, outcome: str, tokens: TokenUsage, *, cached: bool = False) -> UsageRecord | None:
        """The request has ended, with this record; never fails and never waits for the store.

        Call it on the event loop, once: a second end is ignored, and None.
        """
        record = self._journal.finish(request_id, outcome, tokens, self._now(), cached=cached)
        self._taken = self._settled + self._journal.pending
        self._news.set()
        return record

    async def totals(self, account_id: str, since: date | None = None, until: date | None = None) -> list[DailyUsage]:
        """The account's usage by day in UTC and model; both days included, None is no limit.

        Requests that this server has finished before the call are in it.

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
        """Wait until the store has every record of now; False if it did not come to that in time."""
        target = self._taken
        self._news.set()
        try:
            async with asyncio.timeout(timeout_seconds), self._progress:
                await self._progress.wait_for(lambda: self._settled >= target)
        except TimeoutError:
            return False
        return True

    async def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Write what can be written in time; the rest stays in the journal for the next start."""
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
                raise LedgerError(f"usage_url: {error}") from error
            self._say_down(error)
        self._tasks = [asyncio.create_task(self._flush_for_ever()), asyncio.create_task(self._sync_for_ever())]
        self._news.set()

    async def _migrate(self) -> None:
        if not self._migrated:
            await self._store.migrate()
            self._migrated = True

    async def _flush_for_ever(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            await asyncio.sleep(BATCH_SECONDS)
            while self._journal.pending:
                await self._flush_batch()

    async def _flush_batch(self) -> None:
        """Write the oldest records, as often as it takes."""
        batch = self._journal.oldest(BATCH_RECORDS)
        retry_seconds = FIRST_RETRY_SECONDS
        while not await self._insert(batch):
            await asyncio.sleep(retry_seconds)
            retry_seconds = min(2 * retry_seconds, LAST_RETRY_SECONDS)
        self._journal.settle(len(batch))
        self._settled += len(batch)
        async with self._progress:
            self._progress.notify_all()

    async def _insert(self, batch: list[UsageRecord]) -> bool:
        try:
            await self._migrate()
            await self._store.insert(batch)
        except (StoreUnavailable, LedgerError) as error:
            self._say_down(error)
            return False
        if self._is_down:
            logger.info("the usage store is back")
        self._is_down = False
        return True

    def _say_down(self, error: Exception) -> None:
        if not self._is_down:
            logger.warning("the usage store is down, and records wait in the journal: %s", error)
        self._is_down = True

    async def _sync_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            await asyncio.to_thread(self._journal.sync)


def _check_prices(neuron_costs: Mapping[str, Decimal]) -> None:
    for metric, cost in neuron_costs.items():
        if cost.scaleb(NEURON_DECIMALS) % 1:
            raise LedgerError(
                f"neuron_cost of {metric}: {cost} has more than the {NEURON_DECIMALS} decimals that the ledger holds"
            )
