"""State of one call for telemetry: each part of the server adds attributes; the observer reads them at the end.

A call never holds request text, reply text or an API key, so that no metric, span or log record can leak them.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from llama2_server.errors import ServiceError
from llama2_server.telemetry.guard import run_guarded
from llama2_server.usage.pricing import TokenUsage

API_PACKAGES = "llama2."

Attribute = str | int | float | bool
Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Phase:
    """A named part of a call's time; both times are from `time.monotonic`."""

    name: str
    started_at: float
    finished_at: float


@dataclass(frozen=True, slots=True)
class GenerationTimes:
    """Times of one generation, from `time.monotonic`; 0 if the generation has not reached that point."""

    queued_at: float
    admitted_at: float
    """When the request queue granted a slot."""
    first_token_at: float
    finished_at: float

    def phases(self, since: float, until: float) -> Iterator[Phase]:
        """Yield queue, prefill and decode, cut to the time after `since`; an unfinished phase ends at `until`."""
        times = [self.queued_at, *(at or until for at in (self.admitted_at, self.first_token_at, self.finished_at))]
        for name, started_at, finished_at in zip(("queue", "prefill", "decode"), times, times[1:], strict=False):
            if finished_at > max(started_at, since):
                yield Phase(name, max(started_at, since), finished_at)


@dataclass(frozen=True, slots=True)
class RecordedUsage:
    """Contents of a call's usage record."""

    tokens: TokenUsage
    neurons: Decimal
    cached: bool
    """Whether the tokens were computed for another call."""


class CallObserver(Protocol):
    """Callbacks for calls, on the event loop. An exception of a callback is logged and changes no reply."""

    def call_started(self, call: "Call", metadata: Metadata) -> None:
        """Handle a new call, of which only the method is known."""

    def call_finished(self, call: "Call") -> None:
        """Handle a call that has its status; its usage may follow while the engine finishes its last step."""

    def usage_recorded(self, call: "Call", usage: RecordedUsage) -> None:
        """Handle a call's usage record."""

    def call_completed(self, call: "Call") -> None:
        """Handle a call to which nothing is added anymore."""


class Call:
    """Attributes of one call; `started_at` and `finished_at` are from `time.monotonic`.

    Args:
        observer: receives the call's events.
        method: package, service and method: `llama2.v1.TextGenerationService/Generate`.
        metadata: the request's metadata.
        expired: returns whether the call's deadline has passed.
    """

    def __init__(self, observer: CallObserver, method: str, metadata: Metadata, expired: Callable[[], bool]) -> None:
        self.method = method
        self.request_id = uuid.uuid4().hex
        self.expired = expired
        self.started_at = time.monotonic()
        self.started_at_ns = time.time_ns()
        """Start in wall-clock nanoseconds since the epoch, for spans."""
        self.finished_at = 0.0
        self.code = ""
        """Name of the gRPC status code; empty until the call has its status."""
        self.error: ServiceError | None = None
        self.account_id: str | None = None
        self.request: Mapping[str, Attribute] = {}
        """Parameters of the request, by their OpenTelemetry names."""
        self.finish_reason: str | None = None
        self.usage: RecordedUsage | None = None
        self.times: GenerationTimes | None = None
        self.trace_id: str | None = None
        self.span_id: str | None = None
        self._phases: list[Phase] = []
        self._observer = observer
        self._awaits_usage = False
        run_guarded(observer.call_started, self, metadata)

    @property
    def is_public_api(self) -> bool:
        """Whether the method belongs to this API; health and reflection do not."""
        return self.method.startswith(API_PACKAGES)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body of the `with`, however it ends."""
        started_at = time.monotonic()
        try:
            yield
        finally:
            self._phases.append(Phase(name, started_at, time.monotonic()))

    def mark_admitted(self) -> None:
        """Delay the call's completion until `set_usage`, because an admitted call gets a usage record."""
        self._awaits_usage = True

    def mark_unrecorded(self) -> None:
        """Complete the call without a usage record: it was not admitted after all."""
        self._awaits_usage = False
        self._complete_if_done()

    def set_usage(self, usage: RecordedUsage, times: GenerationTimes | None, finish_reason: str | None) -> None:
        """Store the call's usage record, and the times of the generation that served the call, if there was one."""
        self.usage, self.times, self.finish_reason = usage, times, finish_reason
        run_guarded(self._observer.usage_recorded, self, usage)
        self._awaits_usage = False
        self._complete_if_done()

    def finish(self, code: str) -> None:
        """Store the name of the call's gRPC status code."""
        self.code, self.finished_at = code, time.monotonic()
        run_guarded(self._observer.call_finished, self)
        self._complete_if_done()

    def phases(self) -> list[Phase]:
        """Return the phases of a completed call."""
        if self.times is None:
            return self._phases
        # A call may join a generation in progress: only the time after this call's own phases counts.
        since = self._phases[-1].finished_at if self._phases else self.started_at
        return [*self._phases, *self.times.phases(since, time.monotonic())]

    def _complete_if_done(self) -> None:
        if self.code and not self._awaits_usage:
            run_guarded(self._observer.call_completed, self)


CALL: ContextVar[Call] = ContextVar("call")
"""The call that the current task serves."""
