"""One call as telemetry sees it: each part that it passes adds the facts it learns, and they are told once it is over.

None of the facts is text of a request or a reply, nor a key: what is not gathered cannot leak.
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

OUR_PACKAGE = "llama2.v1."

Attribute = str | int | float | bool
Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a call's time; moments are by time.monotonic."""

    name: str
    begun: float
    ended: float


@dataclass(frozen=True, slots=True)
class GenerationTimes:
    """When a generation got how far, by time.monotonic; 0 for what has not come."""

    asked_for_slot: float
    got_slot: float
    first_token: float
    finished: float

    def phases(self, since: float, until: float) -> Iterator[Phase]:
        """Its wait, prefill and decode, as far as they lie behind `since`; what is still going on lasts `until`."""
        last = until
        moments = [self.asked_for_slot, self.got_slot or last, self.first_token or last, self.finished or last]
        for name, begun, ended in zip(("wait", "prefill", "decode"), moments, moments[1:], strict=False):
            if ended > max(begun, since):
                yield Phase(name, max(begun, since), ended)


@dataclass(frozen=True, slots=True)
class Usage:
    """What the ledger's record of a call says."""

    input_tokens: int
    output_tokens: int
    neurons: Decimal
    cached: bool
    """Whether the tokens were computed for another call."""


class CallObserver(Protocol):
    """Who hears of calls; on the event loop."""

    def call_began(self, call: "Call", metadata: Metadata) -> None:
        """A call is taken on; nothing but its method is known."""

    def call_ended(self, call: "Call") -> None:
        """The call has its status; its usage may follow, if tokens are still being computed for it."""

    def usage_recorded(self, call: "Call", usage: Usage) -> None:
        """The ledger has its record."""

    def call_over(self, call: "Call") -> None:
        """Nothing more will be known of it."""


class Call:
    """The facts of one call; `expired` tells whether its deadline has passed."""

    def __init__(self, observer: CallObserver, method: str, metadata: Metadata, expired: Callable[[], bool]) -> None:
        self.method = method
        """Package, service and method: llama2.v1.TextGenerationService/Generate."""
        self.request_id = uuid.uuid4().hex
        self.expired = expired
        self.begun = time.monotonic()
        self.begun_at_ns = time.time_ns()
        self.ended = 0.0
        self.code = ""
        """The gRPC status code's name; empty until the call has ended."""
        self.error: ServiceError | None = None
        self.account: str | None = None
        self.request: Mapping[str, Attribute] = {}
        """Numbers of the request, by their OpenTelemetry names."""
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.moments: GenerationTimes | None = None
        self.phases: list[Phase] = []
        self.trace_id: str | None = None
        self.span_id: str | None = None
        self._observer = observer
        self._awaits_record = False
        observer.call_began(self, metadata)

    @property
    def ours(self) -> bool:
        """Whether it is a method of this API; health and reflection are machines talking to machines."""
        return self.method.startswith(OUR_PACKAGE)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body of the `with`, however it ends."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.phases.append(Phase(name, begun, time.monotonic()))

    def admitted(self) -> None:
        """From here on the call has a record, and is not over before it is written."""
        self._awaits_record = True

    def recorded(self, usage: Usage, moments: GenerationTimes | None, finish_reason: str | None) -> None:
        """The ledger has the record; `moments` are those of the generation that served the call, if one did."""
        self.usage, self.moments, self.finish_reason = usage, moments, finish_reason
        self._observer.usage_recorded(self, usage)
        self._awaits_record = False
        self._tell_if_over()

    def end(self, code: str) -> None:
        """The call has its status."""
        self.code, self.ended = code, time.monotonic()
        self._observer.call_ended(self)
        self._tell_if_over()

    def all_phases(self) -> list[Phase]:
        """Where its time went, once it is over."""
        if self.moments is None:
            return self.phases
        since = self.phases[-1].ended if self.phases else self.begun  # a call may join a generation under way
        return [*self.phases, *self.moments.phases(since, time.monotonic())]

    def _tell_if_over(self) -> None:
        if self.code and not self._awaits_record:
            self._observer.call_over(self)


CALL: ContextVar[Call] = ContextVar("call")
"""The call being served."""
