"""Prometheus metrics of calls, tokens, engine steps and the model, on an injected registry.

The other parts of the server register their own metrics on the same registry. A scrape runs on another thread: a
collector reads only numbers that the event loop replaces in one step, or data behind a lock.

No label grows with client input: methods are the existing ones, codes are gRPC's, and no label names an account.
"""

from collections.abc import Iterable, Iterator
from decimal import Decimal
from functools import cache
from importlib.metadata import version
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llama2_server.engine.steps.report import StepPhase, StepReport
from llama2_server.errors import BudgetExhausted, QueueFull, QueueWaitTooLong, QuotaExceeded
from llama2_server.telemetry.call import Call, RecordedUsage

UNKNOWN_METHOD = "unknown"

# Seconds. A cached reply takes milliseconds, others take minutes; the last bounds exceed the queue timeout.
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
QUEUE_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 300)
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160, 300)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class ModelProperties(Protocol):
    """Properties of a model that the metrics show."""

    @property
    def device(self) -> object:
        """The torch device."""

    @property
    def dtype(self) -> object:
        """The torch dtype."""

    @property
    def kernels(self) -> str:
        """The family of the native kernels, portable or amx; empty if the model does not run natively."""

    @property
    def memory_bytes(self) -> int:
        """Memory in bytes; the scrape thread reads it."""


class Metrics:
    """Metrics of calls, tokens, engine steps and the model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # Each counter would get a second series `_created`, which Prometheus does not need. The switch is global.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "llama2_requests",
            f'Finished calls, by method and gRPC status code; method="{UNKNOWN_METHOD}" for methods that do not exist.',
            ("method", "code"),
            registry=registry,
        )
        self._quota_rejections = Counter(
            "llama2_quota_rejections", "Calls rejected because their account's quota was used up.", registry=registry
        )
        self._budget_rejections = Counter(
            "llama2_budget_rejections",
            "Calls rejected because their price did not fit into their account's budget.",
            registry=registry,
        )
        self._queue_rejections = Counter(
            "llama2_queue_rejections",
            "Calls rejected because the queue was full or the wait too long.",
            registry=registry,
        )
        self._tokens = Counter(
            "llama2_tokens",
            "Tokens computed for recorded requests, as in the usage ledger; cached tokens do not count.",
            ("type",),
            registry=registry,
        )
        self._guesses = Counter(
            "llama2_prompt_lookup_tokens",
            "Tokens that prompt lookup proposed, and proposed tokens that became a part of a reply (accepted).",
            ("type",),
            registry=registry,
        )
        self._neurons = _ExactCounter(
            "llama2_neurons", "Neurons of recorded requests, as in the usage ledger: tokens at the card's prices."
        )
        registry.register(self._neurons)
        self._add_histograms()
        # The lookup of a series takes longer than its update. The number of methods and codes is fixed.
        self._finished = cache(self._requests.labels)
        self._seconds = cache(self._request_seconds.labels)
        # Create these series now: a rate over a series that appears with its first event misses that event.
        self._input_tokens, self._output_tokens = (self._tokens.labels(kind) for kind in ("input", "output"))
        self._steps = {phase: self._step.labels(phase) for phase in StepPhase}
        self._proposed, self._accepted = (self._guesses.labels(kind) for kind in ("proposed", "accepted"))

    def register(
        self,
        model_name: str,
        model: ModelProperties,
        step_kind: str,
        methods: Iterable[str],
        collectors: Iterable[Collector],
    ) -> None:
        """Register the metrics of the parts: the model, the API's methods, and each part's own collector.

        The series of the methods exist before their first call: a rate over a series that appears with its first event
        would miss that event.
        """
        for method in methods:
            self._requests.labels(method, "OK")
            self._request_seconds.labels(method)
        for collector in collectors:
            self.registry.register(collector)
        self._register_model(model_name, model, step_kind)

    def _register_model(self, name: str, model: ModelProperties, step_kind: str) -> None:
        build = Info(
            "llama2_build",
            "Version of the server, the model that it serves, the kind of its steps, and the family of native kernels.",
            registry=self.registry,
        )
        dtype = str(model.dtype).removeprefix("torch.")
        device = str(model.device)
        execution = {"device": device, "dtype": dtype, "step": step_kind, "kernels": model.kernels}
        build.info({"version": version("llama2-grpc"), "model": name, **execution})
        memory = Gauge(
            "llama2_device_memory_bytes",
            "Memory that torch has allocated on a CUDA device; on a CPU, size of the weights and the KV cache.",
            registry=self.registry,
        )
        memory.set_function(lambda: model.memory_bytes)

    def call_finished(self, call: Call) -> None:
        """Count a call."""
        self._finished(call.method, call.code).inc()
        self._seconds(call.method).observe(call.finished_at - call.started_at)
        if isinstance(call.error, QuotaExceeded):
            self._quota_rejections.inc()
        if isinstance(call.error, BudgetExhausted):
            self._budget_rejections.inc()
        if isinstance(call.error, QueueFull | QueueWaitTooLong):
            self._queue_rejections.inc()

    def unknown_method(self) -> None:
        """Count a call of a method that does not exist."""
        self._requests.labels(UNKNOWN_METHOD, "UNIMPLEMENTED").inc()

    def usage_recorded(self, call: Call, usage: RecordedUsage) -> None:
        """Count the tokens and neurons of a usage record."""
        if usage.cached:
            return
        self._input_tokens.inc(usage.tokens.input_tokens)
        self._output_tokens.inc(usage.tokens.output_tokens)
        self._neurons.inc(usage.neurons)
        if call.times is not None and usage.tokens.output_tokens > 0:
            self._first_token.observe(call.times.first_token_at - call.started_at)
        if call.times is not None and usage.tokens.output_tokens > 1:
            seconds = call.times.finished_at - call.times.first_token_at
            self._per_token.observe(seconds / (usage.tokens.output_tokens - 1))

    def on_step(self, step: StepReport) -> None:
        """Observe a step of the engine; called on the engine's thread."""
        self._steps[step.phase].observe(step.seconds)
        if step.proposed:
            self._proposed.inc(step.proposed)
            self._accepted.inc(step.accepted)

    def _add_histograms(self) -> None:
        self._request_seconds = Histogram(
            "llama2_request_duration_seconds",
            "Time from a call's start to its status.",
            ("method",),
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.queue_time = Histogram(
            "llama2_queue_time_seconds",
            "Time in the queue until the request got a slot or left the queue.",
            buckets=QUEUE_BUCKETS,
            registry=self.registry,
        )
        self._first_token = Histogram(
            "llama2_time_to_first_token_seconds",
            "Time from a call's start to the first token that was computed for it.",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self._per_token = Histogram(
            "llama2_time_per_output_token_seconds",
            "Mean time per token after a reply's first token; replies of one token do not count.",
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )
        self._step = Histogram(
            "llama2_engine_step_duration_seconds",
            "Time of one engine step: a part of one prompt, tokens of every sequence that decodes, or both (mixed).",
            ("phase",),
            buckets=STEP_BUCKETS,
            registry=self.registry,
        )


class _ExactCounter(Collector):
    """A counter of decimals: the sum is exact, and becomes a float only in a scrape."""

    def __init__(self, name: str, documentation: str) -> None:
        self._name = name
        self._documentation = documentation
        self._sum = Decimal(0)

    def inc(self, amount: Decimal) -> None:
        self._sum += amount

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._documentation, value=float(self._sum))
