"""Run telemetry so that its failure changes nothing else: no reply, no slot and no step of the engine."""

import logging
import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

logger = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 60.0

P = ParamSpec("P")

# By the function's name. A failure per call or per step must not fill the log.
_logged_at: dict[str, float] = {}


def run_guarded(report: Callable[P, object], *args: P.args, **options: P.kwargs) -> None:
    """Call `report` and never raise; each function's exceptions are logged at most once per minute."""
    try:
        report(*args, **options)
    except Exception as error:  # the caller serves a request
        name = getattr(report, "__qualname__", type(report).__qualname__)
        now = time.monotonic()
        if now - _logged_at.get(name, -LOG_INTERVAL_SECONDS) >= LOG_INTERVAL_SECONDS:
            _logged_at[name] = now
            logger.error("telemetry failed in %s", name, exc_info=error)  # noqa: TRY400 - formatted without its message


def guarded(report: Callable[P, object]) -> Callable[P, None]:
    """Return a function that calls `report` through `run_guarded`."""

    @wraps(report)
    def call(*args: P.args, **options: P.kwargs) -> None:
        run_guarded(report, *args, **options)

    return call
