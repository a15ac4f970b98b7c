"""Readiness: the last generation worked, a caller's or, where no caller comes, a probe of our own."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 1.0


class Readiness:
    """SERVING after a generation that worked, NOT_SERVING after one that failed; `keep` tries anew where none comes.

    Args:
        set_serving: changes what the health service says.
        probe: generates something, charged to nobody, and returns when it has ended; `heard` has heard of it then.
        idle: whether no caller would be disturbed by a probe.
        interval_seconds: the longest that nobody knows whether a generation works.
    """

    def __init__(
        self,
        set_serving: Callable[[bool], None],
        probe: Callable[[], Awaitable[object]],
        *,
        idle: Callable[[], bool],
        interval_seconds: float,
    ) -> None:
        self._set_serving = set_serving
        self._probe = probe
        self._idle = idle
        self._interval_seconds = interval_seconds
        self._working = True
        self._due_at = _now() + interval_seconds  # when the next probe is
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._news = asyncio.Event()

    def heard(self, worked: bool) -> None:
        """A generation has ended."""
        now = _now()
        if worked:
            self._due_at, self._retry_seconds = now + self._interval_seconds, FIRST_RETRY_SECONDS
        elif self._working:
            self._due_at = now
        else:
            self._due_at = now + self._retry_seconds
            self._retry_seconds = min(2 * self._retry_seconds, self._interval_seconds)
        if worked != self._working:
            logger.log(
                logging.INFO if worked else logging.ERROR, "the engine %s", "works again" if worked else "failed"
            )
            self._working = worked
            self._set_serving(worked)
        self._news.set()

    async def keep(self) -> None:
        """Probe whenever nobody has generated anything for long, and after a failure; never while callers are there."""
        while True:
            self._news.clear()
            wait = self._due_at - _now()
            if wait <= 0 and self._idle():
                await self._probe()
                continue
            # A caller who is served brings news; one whose sequence was cancelled brings none.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait if wait > 0 else FIRST_RETRY_SECONDS):
                    await self._news.wait()


def _now() -> float:
    return asyncio.get_running_loop().time()
