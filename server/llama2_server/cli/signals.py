"""The end of the process by a signal, before an event loop handles signals.

This module imports only what is necessary, so that the handlers exist early; `typing` would take most of the time.
"""

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def exit_on_signals() -> None:
    """Handle SIGINT, SIGTERM and SIGHUP with one line and exit code 128 + number; an ignored SIGHUP stays ignored.

    Without handlers, SIGINT raises KeyboardInterrupt inside any import, and the first process of a container ignores
    SIGTERM. A parent process that blocks the signals delays them until the handlers exist.
    """
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def stopped_by(exit_code: int) -> str | None:
    """Return the line for an exit code of 128 + signal, or None for another exit code."""
    if exit_code - 128 not in SIGNALS:
        return None
    return f"llama2-server: stopped by {signal.Signals(exit_code - 128).name}\n"


def _exit(number: int, frame: "FrameType | None") -> "NoReturn":
    # An exception could be caught or reported by the code that the signal interrupts.
    os.write(2, (stopped_by(128 + number) or "").encode())
    os._exit(128 + number)
