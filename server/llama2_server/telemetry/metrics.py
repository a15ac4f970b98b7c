"""Every Prometheus metric of the server, on an injected registry.

No label grows with what callers send: methods are those that exist, codes are gRPC's, and there is none for accounts.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from decimal import Decimal

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llama2_server.errors import QuotaExceeded
from llama2_server.telemetry.call import Call, RecordedUsage

UNKNOWN_METHOD = "unknown"
SNAPSHOT_TIMEOUT_SECONDS = 1.0

# Seconds. A reply takes from a blink (out of the cache) to minutes; the last bounds are the line's limit and beyond.
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
WAIT_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 300)
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160, 300)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30)


@dataclass(frozen=True, slots=True)
class GaugeSnapshot:
    """What is read at each scrape instead of being counted; each field is the metric `llama2_` and its name."""

    requests_queued: int
    requests_running: int
    max_concurrent_requests: int
    ready: bool
    response_cache_hits: int
    response_cache_misses: int
    response_cache_bytes: int
    quota_store_errors: int
    quota_store_up: bool
    usage_lag_seconds: float
    usage_pending_records: int
    usage_journal_bytes: int
    device_memory_bytes: int


GAUGES = {
    "requests_queued": "Requests that wait in line for a slot.",
    "requests_running": "RequestQueue in use.",
    "max_concurrent_requests": "Slots there are: the card's max_concurrent_requests.",
    "ready": "1 while readiness says SERVING, else 0.",
    "response_cache_bytes": "Memory that the response cache takes in this process; 0 where it is in Redis or off.",
    "quota_store_up": "1 if the store of the quotas answered when it was last asked, always so in memory; else 0.",
    "usage_lag_seconds": "Age of the oldest usage record that the ledger's store does not have yet; 0 if none waits.",
    "usage_pending_records": "Usage records that the ledger's store does not have yet.",
    "usage_journal_bytes": "Size of the usage journal on disk.",
    "device_memory_bytes": "On CUDA what torch has allocated on the device; on a CPU the weights and the KV cache.",
}
COUNTERS = {
    "response_cache_hits": "Requests answered from the response cache.",
    "response_cache_misses": "Requests that looked in the response cache in vain.",
    "quota_store_errors": "Requests that could not be counted in the shared store of the quotas.",
}


class Metrics:
    """The metrics; what is counted is counted here, what is read comes from `read_from`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # A series more for each counter, for what Prometheus sees by itself: the library's only switch is global.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "llama2_requests",
            f'Calls that ended, by method and gRPC status code; method="{UNKNOWN_METHOD}" for any that does not exist.',
            ("method", "code"),
            registry=registry,
        )
        self._request_seconds = Histogram(
            "llama2_request_duration_seconds",
            "Time from a call's start to its status.",
            ("method",),
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self.queue_time = Histogram(
            "llama2_queue_time_seconds",
            "Time in line until a slot was got, or the wait given up.",
            buckets=WAIT_BUCKETS,
            registry=registry,
        )
        self._first_token = Histogram(
            "llama2_time_to_first_token_seconds",
            "Time from a call's start to the first token that was computed for it.",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._per_token = Histogram(
            "llama2_time_per_output_token_seconds",
            "Mean time of a reply's tokens after its first one, where there are any.",
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self._tokens = Counter(
            "llama2_tokens",
            "Tokens computed for recorded requests, as in the usage ledger; those served from the cache are not.",
            ("type",),
            registry=registry,
        )
        self._quota_refusals = Counter(
            "llama2_quota_rejections", "Calls refused because their account's quota was used up.", registry=registry
        )
        self._step = Histogram(
            "llama2_engine_step_duration_seconds",
            "Time of one step of the engine: a chunk of a prompt, or a token for every sequence that decodes.",
            ("phase",),
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self._readings = _SnapshotCollector()
        registry.register(self._readings)
        # Series that are there from the start: a rate over one that appears with its first event misses that event.
        self._input_tokens, self._output_tokens = (self._tokens.labels(kind) for kind in ("input", "output"))
        self._steps = {phase: self._step.labels(phase) for phase in ("prefill", "decode")}

    def preregister_methods(self, methods: Iterable[str]) -> None:
        """Show these methods from the start."""
        for method in methods:
            self._requests.labels(method, "OK")
            self._request_seconds.labels(method)

    def set_build(self, *, version: str, model: str, device: str, dtype: str) -> None:
        """Say what is running."""
        build = Info("llama2_build", "Version of the server, and the model that it serves.", registry=self.registry)
        build.info({"version": version, "model": model, "device": device, "dtype": dtype})

    def read_from(self, read: Callable[[], GaugeSnapshot]) -> None:
        """From now on take readings by `read`, which is called on the running event loop only."""
        self._readings.read_from(read, asyncio.get_running_loop())

    def call_finished(self, call: Call) -> None:
        """Count a call."""
        self._requests.labels(call.method, call.code).inc()
        self._request_seconds.labels(call.method).observe(call.finished_at - call.started_at)
        if isinstance(call.error, QuotaExceeded):
            self._quota_refusals.inc()

    def unknown_method(self) -> None:
        """Count a call of a method that does not exist."""
        self._requests.labels(UNKNOWN_METHOD, "UNIMPLEMENTED").inc()

    def usage_recorded(self, call: Call, usage: RecordedUsage) -> None:
        """Count what the ledger has just recorded."""
        if usage.cached:
            return
        self._input_tokens.inc(usage.tokens.input_tokens)
        self._output_tokens.inc(usage.tokens.output_tokens)
        self._readings.neurons += usage.neurons
        if call.times is not None and usage.tokens.output_tokens > 0:
            self._first_token.observe(call.times.first_token_at - call.started_at)
        if call.times is not None and usage.tokens.output_tokens > 1:
            seconds = call.times.finished_at - call.times.first_token_at
            self._per_token.observe(seconds / (usage.tokens.output_tokens - 1))

    def on_step(self, phase: str, seconds: float, rows: int) -> None:
        """Take a step of the engine, on its thread."""
        self._steps[phase].observe(seconds)


class _SnapshotCollector(Collector):
    """Takes the readings on the event loop, because the parts may only be looked at from there.

    A loop that does not answer in time costs the scrape those readings, and not the scrape.
    """

    def __init__(self) -> None:
        self.neurons = Decimal(0)
        """Summed exactly, and rounded to a float but once, when it is shown."""
        self._read: Callable[[], GaugeSnapshot] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0

    def read_from(self, read: Callable[[], GaugeSnapshot], loop: asyncio.AbstractEventLoop) -> None:
        self._read, self._loop, self._thread = read, loop, threading.get_ident()

    def collect(self) -> Iterator[Metric]:
        readings = self._take()
        for name, documentation in GAUGES.items():
            gauge = GaugeMetricFamily(f"llama2_{name}", documentation)
            if readings is not None:
                gauge.add_metric([], float(getattr(readings, name)))
            yield gauge
        for name, documentation in COUNTERS.items():
            counter = CounterMetricFamily(f"llama2_{name}", documentation)
            if readings is not None:
                counter.add_metric([], float(getattr(readings, name)))
            yield counter
        neurons = "Neurons of recorded requests, as in the usage ledger: tokens at the card's prices."
        yield CounterMetricFamily("llama2_neurons", neurons, value=float(self.neurons))

    def _take(self) -> GaugeSnapshot | None:
        if self._read is None or self._loop is None:
            return None
        if threading.get_ident() == self._thread:
            return self._read()
        taken: Future[GaugeSnapshot] = Future()
        try:
            self._loop.call_soon_threadsafe(lambda read: taken.set_result(read()), self._read)
            return taken.result(SNAPSHOT_TIMEOUT_SECONDS)
        except (RuntimeError, TimeoutError):  # the loop is closed, or hangs
            return None
