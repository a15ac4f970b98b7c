"""Signals of a server process, next to its event loop."""

import asyncio
import signal

from llama2_server.lifecycle.tasks import EXIT_SIGNAL, SignalIgnoringLoop, exit_code_on_signals

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def exit_code_of_own_signal() -> int:
    """Send SIGTERM to this process, and return the exit code that it sets."""
    exit_code = exit_code_on_signals()
    signal.raise_signal(signal.SIGTERM)
    return await exit_code


def test_signals_after_the_event_loop_are_ignored() -> None:
    """From the first signal on the exit code is known; a signal while the process ends changes nothing."""
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with asyncio.Runner(loop_factory=SignalIgnoringLoop) as runner:
            assert runner.run(exit_code_of_own_signal()) == EXIT_SIGNAL + signal.SIGTERM
        assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
