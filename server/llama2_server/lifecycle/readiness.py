"""Readiness: whether the last generation succeeded, a client's or, without clients, a probe's.

A device can stay broken, for example after an illegal address in a CUDA kernel. Only a new process recovers from that,
so failed probes in a row end this one.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 1.0
MAX_FAILED_PROBES = 3


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
        self._failed_probes = 0  # in a row
        self._changed = asyncio.Event()

    def record_outcome(self, succeeded: bool) -> None:
        """Record that a generation has ended."""
        now = _now()
        if succeeded:
            self._probe_at, self._retry_seconds = now + self._interval_seconds, FIRST_RETRY_SECONDS
            self._failed_probes = 0
        elif self._last_succeeded:  # a later failure of a client does not delay the next probe
            self._probe_at = now
        if succeeded != self._last_succeeded:
            level, event = (logging.INFO, "recovered") if succeeded else (logging.ERROR, "failed")
            logger.log(level, "the engine %s", event)
            self._last_succeeded = succeeded
            self._set_serving(succeeded)
        self._changed.set()

    async def run(self, probe: Callable[[], Awaitable[bool]], *, idle: Callable[[], bool]) -> None:
        """Probe after an interval without generations, and after a failure; return after MAX_FAILED_PROBES in a row.

        Args:
            probe: generates without an account, and returns whether it succeeded.
            idle: returns whether no client is served. Before a failure, a probe disturbs no client.
        """
        while self._failed_probes < MAX_FAILED_PROBES:
            self._changed.clear()
            wait_seconds = self._probe_at - _now()
            if wait_seconds <= 0 and (idle() or not self._last_succeeded):
                self._record_probe(await _attempt(probe))
                continue
            # A client's generation sets `_changed`; a cancelled one does not, so this also polls.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_seconds if wait_seconds > 0 else FIRST_RETRY_SECONDS):
                    await self._changed.wait()

    def _record_probe(self, succeeded: bool) -> None:
        self.record_outcome(succeeded)
        if succeeded:
            return
        self._failed_probes += 1
        self._probe_at = _now() + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, self._interval_seconds)


async def _attempt(probe: Callable[[], Awaitable[bool]]) -> bool:
    """Return whether a probe succeeds; one that raises has failed, and the next one follows."""
    try:
        return await probe()
    except Exception:
        logger.exception("a probe raised an exception")
        return False


def _now() -> float:
    return asyncio.get_running_loop().time()
