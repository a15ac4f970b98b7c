"""The metrics of calls with an idempotency key."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llama2_server.errors import IdempotencyKeyReused

Result = Literal["new", "joined", "cached", "recomputed", "conflict"]


class KeyMetrics(Collector):
    """Counts what the calls with a key have found; a scrape reads the numbers on another thread."""

    def __init__(self) -> None:
        self._calls: dict[str, int] = dict.fromkeys(get_args(Result), 0)
        self._fallbacks = 0

    def count(self, result: Result) -> None:
        """Count a call."""
        self._calls[result] += 1

    def count_fallback(self) -> None:
        """Count a key that holds only on this server."""
        self._fallbacks += 1

    @contextmanager
    def conflicts(self) -> Iterator[None]:
        """Count the call if the body finds another request under its key."""
        try:
            yield
        except IdempotencyKeyReused:
            self.count("conflict")
            raise

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics, on the scrape thread."""
        calls = CounterMetricFamily(
            "llama2_idempotency_calls",
            "Calls with an idempotency key: a new key, a running generation joined, a cached or recomputed reply, or "
            "another request under the key.",
            labels=("result",),
        )
        for result, count in self._calls.items():
            calls.add_metric((result,), count)
        yield calls
        yield CounterMetricFamily(
            "llama2_idempotency_fallbacks",
            "Calls whose idempotency key holds only on this replica, because the usage store did not answer.",
            self._fallbacks,
        )
