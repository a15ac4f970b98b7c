"""Deadlines and timers that expire on command, over real sockets."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from llama2_server.api.incoming.message_check import Handler

DEADLINE_SECONDS = 60.0
"""Longer than a test takes, and shorter than the server's own timeouts, so that it expires only on command."""
HOUR = 3600.0


def server_deadline(seconds: float = DEADLINE_SECONDS) -> tuple[tuple[str, str], ...]:
    """Return metadata with a deadline that only the server's timer enforces.

    The client's own timer would end the call slightly earlier, and the server could count that as a cancellation.
    """
    return (("grpc-timeout", f"{seconds * 1000:.0f}m"),)


def increasing_timeouts(first_seconds: float = 0.5) -> Iterator[float]:
    """Yield timeouts for gRPC's own timers, which no test can control; each is twice as long as the last.

    On a busy machine, such a timer can expire before the call is in the state that a test needs. Then the test tries
    again with the next timeout.

    Raises:
        AssertionError: the last timeout was half a minute.
    """
    timeout = first_seconds
    while timeout <= 32:
        yield timeout
        timeout *= 2
    raise AssertionError("the timer always expired too early")


class LoopClock:
    """The clock of an event loop. `advance` moves it forward, so that asyncio's timers expire at once."""

    def __init__(self, loop_time: Callable[[], float]) -> None:
        self._loop_time = loop_time
        self._advanced_seconds = 0.0

    def __call__(self) -> float:
        """Return the time of the event loop."""
        return self._loop_time() + self._advanced_seconds

    def stop(self) -> None:
        """Stop the clock: from now on, only `advance` moves it."""
        now = self._loop_time()
        self._loop_time = lambda: now

    def advance(self, seconds: float) -> None:
        """Move the clock forward."""
        self._advanced_seconds += seconds

    async def expire(self, task: "asyncio.Task[Any]") -> None:
        """Advance the clock, an hour at a time, until a task that waits for a timer is done."""
        while not task.done():
            self.advance(HOUR)
            await asyncio.sleep(0)


class CallDeadlines:
    """Control over the deadlines of the calls on a server, in place of gRPC's timers.

    gRPC's timer cancels the handler, leaves no remaining time, and sends DEADLINE_EXCEEDED. `expire` does the same for
    each running call that has a deadline.
    """

    def __init__(self) -> None:
        self._running: dict[asyncio.Task[Any], _ExpiringContext] = {}

    def wrap(self, handle: Handler) -> Handler:
        """Return a handler of the interceptor whose calls `expire` can end."""

        async def handle_until_expired(request: Any, grpc_context: Any) -> Any:
            context = _ExpiringContext(grpc_context)
            task = asyncio.ensure_future(handle(request, context))
            self._running[task] = context
            try:
                return await task
            except asyncio.CancelledError:
                if context.remaining_seconds == 0:
                    await grpc_context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
                raise
            finally:
                del self._running[task]

        return handle_until_expired

    def set_remaining(self, seconds: float) -> None:
        """Set the time until the deadline of all running calls that have a deadline; there is at least one."""
        expiring = [context for context in self._running.values() if context.time_remaining() is not None]
        assert expiring, "no running call has a deadline"
        for context in expiring:
            context.remaining_seconds = seconds

    def expire(self) -> None:
        """Let the deadline of all running calls pass that have a deadline; there is at least one."""
        self.set_remaining(0)
        for task, context in self._running.items():
            if context.remaining_seconds == 0:
                task.cancel()


class _ExpiringContext:
    """Wraps the gRPC context of a call."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.remaining_seconds: float | None = None
        """The time until the deadline, if a test has set it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def time_remaining(self) -> float | None:
        """Return the time until the deadline, or None without a deadline."""
        remaining: float | None = self._context.time_remaining()
        return remaining if self.remaining_seconds is None else self.remaining_seconds
