"""Reports of the server to the history: its calls through telemetry, its slots, its quota and its health."""

import math
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tests.reliability.simulation.history import History
from tests.support.simulated.threads import PROCESS

from llama2_server.admission.fair_queue import FairQueue
from llama2_server.admission.quota import Quota, QuotaUnit
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.admission.reservation import Reservation
from llama2_server.api.health import HealthServicer
from llama2_server.telemetry.call import Call, Metadata
from llama2_server.telemetry.metrics import Metrics
from llama2_server.telemetry.telemetry import Telemetry
from llama2_server.usage.ledger import Ledger


class HistoryTelemetry(Telemetry):
    """Telemetry that also tells the history which call has which request id."""

    def __init__(self, history: History, process: str) -> None:
        super().__init__(Metrics(CollectorRegistry()))
        self._history = history
        self._process = process

    def call_started(self, call: Call, metadata: Metadata) -> None:
        """Add the call's request id to the history."""
        number = dict(metadata).get("call")
        if number is not None:
            attributes = {"call": int(number), "id": call.request_id, "process": self._process}
            self._history.add("arrive", **attributes)
        super().call_started(call, metadata)


def observe(patch: pytest.MonkeyPatch, history: History) -> None:
    """Add the slots, the quota, the admissions and the health of all replicas to the history."""
    _observe_slots(patch, history)
    _observe_quota(patch, history)
    admit = Ledger.admit

    async def admitted(self: Ledger, request_id: str, account_id: str, model: str, *also: Any) -> None:
        await admit(self, request_id, account_id, model, *also)
        history.add("admit", process=_process(), id=request_id, account=account_id)

    patch.setattr(Ledger, "admit", admitted)
    set_serving = HealthServicer._notify

    def notify(self: HealthServicer) -> None:
        set_serving(self)
        states = {"serving": self.serving, **self._stores}
        history.add("health", process=_process(), **states)

    patch.setattr(HealthServicer, "_notify", notify)


def _observe_slots(patch: pytest.MonkeyPatch, history: History) -> None:
    release, make_ready = RequestQueue.release, FairQueue.make_ready
    remove, pop_next = FairQueue.remove, FairQueue.pop_next

    def add(event: str, reservation: Reservation) -> None:
        if reservation.account_id:  # probes have no account
            history.add(event, process=_process(), account=reservation.account_id, number=reservation.order[1])

    def released(self: RequestQueue, reservation: Reservation) -> None:
        if reservation.granted:
            add("release", reservation)
        release(self, reservation)

    def made_ready(self: FairQueue, reservation: Reservation) -> None:
        add("wait", reservation)
        make_ready(self, reservation)

    def removed(self: FairQueue, reservation: Reservation) -> None:
        if reservation.confirmed_at < math.inf:  # also before it is granted, and again after it has left
            add("leave", reservation)
        remove(self, reservation)

    def next_popped(self: FairQueue) -> Reservation | None:
        reservation = pop_next(self)
        if reservation is not None:
            add("grant", reservation)
        return reservation

    patch.setattr(RequestQueue, "release", released)
    patch.setattr(FairQueue, "make_ready", made_ready)
    patch.setattr(FairQueue, "remove", removed)
    patch.setattr(FairQueue, "pop_next", next_popped)


def _observe_quota(patch: pytest.MonkeyPatch, history: History) -> None:
    consume, refund = Quota.consume, Quota.refund

    async def consumed(self: Quota, account_id: str) -> QuotaUnit:
        unit = await consume(self, account_id)
        history.add("consume", process=_process(), account=account_id, unit=_unit(unit))
        return unit

    async def refunded(self: Quota, unit: QuotaUnit) -> None:
        history.add("refund", process=_process(), account=unit.account_id, unit=_unit(unit))
        await refund(self, unit)

    patch.setattr(Quota, "consume", consumed)
    patch.setattr(Quota, "refund", refunded)


def _unit(unit: QuotaUnit) -> list[int | None]:
    return [unit.local_at, unit.shared_at]


def _process() -> str:
    process = PROCESS.get()
    return "" if process is None else process.name
