"""The metrics of the usage ledger."""

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llama2_server.usage.ledger import Ledger


class LedgerCollector(Collector):
    """Reads the numbers of a ledger for each scrape."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def collect(self) -> Iterator[Metric]:
        """Yield the ledger's metrics, on the scrape thread."""
        ledger = self._ledger
        for name, documentation, value in (
            (
                "lag_seconds",
                "Age of the oldest usage record that is not in its final store yet, or 0.",
                ledger.lag_seconds,
            ),
            ("pending_records", "Number of usage records that are not in their final store yet.", ledger.pending),
            ("rejected_records", "Number of usage records that the usage store rejected.", ledger.rejected),
            ("database_bytes", "Size of the usage database on the local disk, in bytes.", ledger.database_bytes),
            ("store_up", "1 if the usage store answered the last operation, else 0.", ledger.store_up),
            (
                "disk_writable",
                "1 if the usage database on the local disk accepts records, else 0.",
                ledger.disk_writable,
            ),
        ):
            yield GaugeMetricFamily(f"llama2_usage_{name}", documentation, value)
