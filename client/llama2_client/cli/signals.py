"""The end of the `llama2` command by Ctrl-C or SIGTERM: one line and exit code 128 + number.

This module imports only what is necessary, so that the handlers exist early.
"""

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def exit_on_signals() -> None:
    """End the process on SIGINT and SIGTERM, also if its parent process blocked them; ignored signals stay ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def ignore_signals() -> None:
    """Ignore the signals: the process is at its end, and its exit code is known."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Interruptible:
    """Context in which Ctrl-C raises KeyboardInterrupt, which cancels a call."""

    def __enter__(self) -> None:
        """Replace the handler of `exit_on_signals`, if it is installed."""
        self._replaces = signal.getsignal(signal.SIGINT) is _exit
        if self._replaces:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *error: object) -> None:
        """Install the handler again."""
        if self._replaces:
            signal.signal(signal.SIGINT, _exit)


def _exit(number: int, frame: "FrameType | None") -> "NoReturn":
    # An exception could be caught or reported by the code that the signal interrupts.
    os.write(2, f"llama2: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)
