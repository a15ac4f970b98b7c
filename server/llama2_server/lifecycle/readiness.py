"""Readiness: whether the last generation succeeded, a client's or, without clients, a probe's."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn

logger = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 1.0


class Readiness:
    """Sets SERVING after a successful generation, and NOT_SERVING after a failed one.

    Args:
        set_serving: sets the state of the health service.
        interval_seconds: the longest time without a generation before `run` probes.
    """

    def __init__(self, set_serving: Callable[[bool], None], *, interval_seconds: float) -> None:
        self._set_serving = set_serving
        self._interval_seconds = interval_seconds
        self._last_succeeded = True
        self._probe_at = _now() + interval_seconds
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._changed = asyncio.Event()

    def record_outcome(self, succeeded: bool) -> None:
        """Record that a generation has ended."""
        now = _now()
        if succeeded:
            self._probe_at, self._retry_seconds = now + self._interval_seconds, FIRST_RETRY_SECONDS
        elif self._last_succeeded:
            self._probe_at = now
        else:
            self._probe_at = now + self._retry_seconds
            self._retry_seconds = min(2 * self._retry_seconds, self._interval_seconds)
        if succeeded != self._last_succeeded:
            level, event = (logging.INFO, "recovered") if succeeded else (logging.ERROR, "failed")
            logger.log(level, "the engine %s", event)
            self._last_succeeded = succeeded
            self._set_serving(succeeded)
        self._changed.set()

    async def run(self, probe: Callable[[], Awaitable[object]], *, idle: Callable[[], bool]) -> NoReturn:
        """Probe after an interval without generations, and after a failure; never while clients are served.

        Args:
            probe: generates without an account, and returns after `record_outcome` was called.
            idle: returns whether no client is served, so that a probe disturbs none.
        """
        while True:
            self._changed.clear()
            wait_seconds = self._probe_at - _now()
            if wait_seconds <= 0 and idle():
                await probe()
                continue
            # A client's generation sets `_changed`; a cancelled one does not, so this also polls.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_seconds if wait_seconds > 0 else FIRST_RETRY_SECONDS):
                    await self._changed.wait()


def _now() -> float:
    return asyncio.get_running_loop().time()
