"""The standard health service (grpc.health.v1).

The stock servicer writes to watchers under its lock: one watcher that does not read blocks each status change. It also
keeps watches open during a drain: a graceful stop then waits for its whole grace period. This servicer does neither.
"""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LOOP_TIMEOUT_SECONDS = 1.0
LIVENESS = "liveness"
"""The name that is SERVING while the event loop runs, also while the service loads or drains."""


QUOTA_STORE = "quota-store"
USAGE_STORE = "usage-store"


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Serves Check, List and Watch for "" (the whole server) and each service, all in one state, liveness and stores.

    A shared store changes only the state of its name: otherwise all replicas would leave at once.
    """

    def __init__(self, services: tuple[str, ...]) -> None:
        self._services = ("", *services)
        self._stores = {QUOTA_STORE: True, USAGE_STORE: True}
        self._serving = False
        self._disk_writable = True
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def serving(self) -> bool:
        """Whether the state is SERVING."""
        return self._serving and self._disk_writable and not self._closed

    def set_serving(self, serving: bool) -> None:
        """Set whether the engine serves, and notify the watchers."""
        self._serving = serving
        self._notify()

    def set_disk_writable(self, writable: bool) -> None:
        """Set whether usage can be recorded on the local disk; without it no service is SERVING."""
        if writable != self._disk_writable:
            self._disk_writable = writable
            self._notify()

    def set_store(self, name: str, up: bool) -> None:
        """Set the state of a store."""
        if up != self._stores[name]:
            self._stores[name] = up
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        """Report NOT_SERVING from now on, and end every watch."""
        self._closed = True
        self._notify()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """Return the state of one service; NOT_FOUND for an unknown one, as the protocol specifies."""
        status = self._status(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, request: Any, context: Any) -> Any:
        """Return the state of each name that Check knows."""
        names = (*self._services, LIVENESS, *self._stores)
        statuses = {name: health_pb2.HealthCheckResponse(status=self._status(name)) for name in names}
        messages: Any = health_pb2  # its published types lack this RPC
        return messages.HealthListResponse(statuses=statuses)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """Send the state of one service now and at each change, until the client disconnects or the server drains."""
        sent = None
        while True:
            changed, status = self._changed, self._status(request.service)
            current = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN if status is None else status
            if current != sent:
                await context.write(health_pb2.HealthCheckResponse(status=current))
                sent = current
            if self._closed and self._changed is changed:
                return
            await changed.wait()

    def _status(self, service: str) -> int | None:
        if service == LIVENESS:
            return SERVING
        if service in self._stores:
            return SERVING if self._stores[service] else NOT_SERVING
        if service not in self._services:
            return None
        return SERVING if self.serving else NOT_SERVING


class ReadinessCollector(Collector):
    """The gauge `llama2_ready`; it has no value while the event loop does not answer, because no call is served then.

    Create it on the event loop that serves the calls.
    """

    def __init__(self, health: HealthServicer) -> None:
        self._health = health
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()

    def collect(self) -> Iterator[Metric]:
        """Yield the metric, on the scrape thread or on the event loop."""
        ready = GaugeMetricFamily("llama2_ready", "1 while the health service reports SERVING, else 0.")
        if threading.get_ident() == self._loop_thread or self._loop_answers():
            ready.add_metric([], self._health.serving)
        yield ready

    def _loop_answers(self) -> bool:
        answered = threading.Event()
        try:
            self._loop.call_soon_threadsafe(answered.set)
        except RuntimeError:  # the loop is closed
            return False
        return answered.wait(LOOP_TIMEOUT_SECONDS)
