"""Ctrl-C during a call of the synchronous client: it raises KeyboardInterrupt, and no call continues unseen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Protocol, TypeVar


class _Cancellable(Protocol):
    def cancel(self) -> bool:
        """Cancel the call."""


_Call = TypeVar("_Call", bound=_Cancellable)


@contextmanager
def interruptible() -> Iterator[None]:
    """Context of a wait in which Ctrl-C always raises KeyboardInterrupt.

    gRPC and futures wait in `threading.Condition.wait`. If Ctrl-C interrupts it after it has released its lock and
    before it waits, the `with` block around it releases the lock again, and Python raises RuntimeError instead.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise


def start_call(start: Callable[[], _Call]) -> _Call:
    """Start a call and return it.

    In the main thread, Ctrl-C could interrupt gRPC between the start of a call and the return of the object that can
    cancel it, and the model would run until the deadline. A helper thread starts the call, because Python interrupts
    only the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return start()
    starting: futures.Future[_Call] = futures.Future()

    def run() -> None:
        try:
            starting.set_result(start())
        except BaseException as error:  # passed on to the main thread
            starting.set_exception(error)

    helper = threading.Thread(target=run, daemon=True)
    try:
        with interruptible():
            helper.start()
            return starting.result()
    except KeyboardInterrupt:
        starting.add_done_callback(lambda started: started.exception() or started.result().cancel())
        raise
