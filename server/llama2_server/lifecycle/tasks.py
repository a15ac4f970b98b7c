"""Helpers for startup and shutdown: background tasks, threads, cancellation and signals."""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

EXIT_SIGNAL = 128
"""Exit code of a process that a signal ends, without the signal's number."""
EXIT_INTERRUPTED = EXIT_SIGNAL + signal.SIGINT
"""Exit code after a second signal."""

Result = TypeVar("Result")


class StartupCancelled(Exception):
    """A signal arrived before the service was ready."""


@asynccontextmanager
async def background_task(work: Awaitable[Result]) -> AsyncIterator["asyncio.Future[Result]"]:
    """Run the work during the body, and cancel it afterwards; its exception is logged and changes nothing else."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(_log_exception)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


def _log_exception(task: "asyncio.Future[Any]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a background task failed", exc_info=error)


async def cancel_on(exit_code: "asyncio.Future[int]", work: Awaitable[Result]) -> Result:
    """Return the result of the work, unless `exit_code` is set first.

    Raises:
        StartupCancelled: `exit_code` was set first; the work is cancelled. A thread that does it continues.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task, exit_code), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise StartupCancelled
        return task.result()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


def run_in_thread(name: str, work: Callable[[], Result]) -> "asyncio.Future[Result]":
    """Run the work on a daemon thread, so that the process can exit before it ends."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:  # raised again where the future is awaited
            loop.call_soon_threadsafe(set_unless_cancelled, future.set_exception, error)
        else:
            loop.call_soon_threadsafe(set_unless_cancelled, future.set_result, result)

    def set_unless_cancelled(setter: Callable[[Any], None], value: object) -> None:
        if not future.cancelled():
            setter(value)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


class SignalIgnoringLoop(asyncio.SelectorEventLoop):
    """Event loop after whose end the signals that it handled are ignored: the exit code of the process is known."""

    def remove_signal_handler(self, sig: int) -> bool:
        """Ignore a signal; asyncio would restore the default action, which ends the process in another way."""
        removed = super().remove_signal_handler(sig)
        if removed:
            signal.signal(sig, signal.SIG_IGN)
        return removed


def exit_code_on_signals() -> "asyncio.Future[int]":
    """Return a future that the first SIGTERM, SIGINT or SIGHUP sets to 128 + number; the second signal exits at once.

    A SIGHUP that the parent process ignores, such as `nohup`, stays ignored.
    """
    exit_code: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def on_signal(number: signal.Signals) -> None:
        if exit_code.done():
            os.write(2, f"llama2-server: stopped at once by a second signal, {number.name}\n".encode())
            os._exit(EXIT_INTERRUPTED)
        exit_code.set_result(EXIT_SIGNAL + number)

    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    for number in (signal.SIGTERM, signal.SIGINT, *hangup):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return exit_code
