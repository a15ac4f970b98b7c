"""Log what the server does while it starts, so that it is never silent for long.

The import of torch, the first compilation of GPU kernels and a slow disk take seconds to minutes without a log record.
"""

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

MAX_SILENCE_SECONDS = 3.0


class StartupLog(logging.Handler):
    """Logs the current step after each `max_silence_seconds` without another log record, from `start` to `finish`."""

    def __init__(
        self, max_silence_seconds: float = MAX_SILENCE_SECONDS, now: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._max_silence_seconds = max_silence_seconds
        self._now = now
        self._step = "starting"
        self._step_at = self._shown_at = now()
        self._finished = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, step: str) -> None:
        """Watch the log from now on."""
        self.step(step)
        self.touch()
        self._finished.clear()
        self._thread = threading.Thread(target=self._run, name="startup-log", daemon=True)
        logging.getLogger().addHandler(self)
        self._thread.start()

    def step(self, step: str) -> None:
        """Name the current step, such as "importing torch"."""
        self._step, self._step_at = step, self._now()

    def touch(self) -> None:
        """Count something else that the operator sees, such as a progress bar, as a log record."""
        self._shown_at = self._now()

    def finish(self) -> None:
        """End the watch: the server serves, or it failed; no-op without `start`."""
        logging.getLogger().removeHandler(self)
        self._finished.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def emit(self, record: logging.LogRecord) -> None:
        """Note the time of a log record."""
        self.touch()

    def report(self) -> float:
        """Log the step if the silence is too long; return the time until the next look."""
        if (left := self._shown_at + self._max_silence_seconds - self._now()) > 0:
            return left
        logger.info("still %s, %.0f s", self._step, self._now() - self._step_at)
        self.touch()
        return self._max_silence_seconds

    def _run(self) -> None:
        while not self._finished.wait(self.report()):
            pass


STARTUP_LOG = StartupLog()
"""The log of this process."""
