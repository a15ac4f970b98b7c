"""Threads of the server as greenlets on one event loop, so that a seed determines their order.

The code of the threads runs unchanged. A thread that would block returns to the event loop, and continues at a virtual
time. Between two blocking operations nothing else runs.
"""

import asyncio
import queue
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from types import TracebackType
from typing import Any, Self

from greenlet import getcurrent, greenlet  # type: ignore[import-untyped]
from tests.support.virtual_time import VirtualTimeLoop


class Process:
    """A simulated process: its tasks and its threads, which `kill` ends like SIGKILL."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.tasks: dict[asyncio.Task[Any], None] = {}

    def kill(self) -> None:
        """End all threads where they are, and cancel all tasks: no thread continues, so nothing reaches the disk."""
        self.alive = False
        for task in list(self.tasks):
            task.cancel()


PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)
"""The process that runs the current code; None for clients."""


class SimulationLoop(VirtualTimeLoop):
    """A loop in virtual time whose executor and threads are greenlets."""

    def __init__(self) -> None:
        super().__init__()
        self.set_task_factory(_create_task)

    def call_soon_threadsafe(  # type: ignore[override]  # all threads are greenlets of this one
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: object, function: Callable[..., Any], *args: Any
    ) -> "asyncio.Future[Any]":
        future = self.create_future()
        process = PROCESS.get()
        if process is not None and not process.alive:  # its tasks end, whatever they wait for
            future.cancel()
            return future

        def run() -> None:
            try:
                result = function(*args)
            except Exception as error:  # raised again where the future is awaited
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        Thread(target=run).start()
        return future


def _create_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> "asyncio.Task[Any]":
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
    context: Context | None = options.get("context")
    process = PROCESS.get() if context is None else context.get(PROCESS)
    if process is not None:
        process.tasks[task] = None
        task.add_done_callback(process.tasks.pop)
        if not process.alive:
            task.cancel()
    return task


class _Waiter:
    """A thread that waits; `resume` lets it continue unless its process was killed, or it has been resumed."""

    def __init__(self) -> None:
        self._thread = getcurrent()
        self._process = PROCESS.get()
        self._resumed = False
        self.timed_out = False
        self._loop = asyncio.get_running_loop()
        hub = self._thread.parent
        if hub is None:
            raise RuntimeError("the event loop itself would block")
        self._hub = hub

    def wait(self, timeout: float | None = None) -> None:
        """Return to the event loop until `resume`, or until the timeout."""
        timer = None if timeout is None else self._loop.call_later(timeout, self._expire)
        self._hub.switch()
        if timer is not None:
            timer.cancel()

    def resume(self, delay: float = 0.0) -> None:
        """Let the thread continue."""
        if not self._resumed:
            self._resumed = True
            self._loop.call_later(delay, self._switch)

    def _expire(self) -> None:
        if not self._resumed:
            self._resumed = self.timed_out = True
            self._switch()

    def _switch(self) -> None:
        if self._process is None or self._process.alive:
            self._thread.switch()


def pause(seconds: float) -> None:
    """Let virtual time pass in a thread; other code runs in the meantime."""
    _Waiter().wait(seconds)


class Thread:
    """Stands for `threading.Thread`."""

    def __init__(self, *, target: Callable[[], object], name: str = "", daemon: bool = False) -> None:
        self._target = target
        self._process = PROCESS.get()
        self._ended = False
        self._joining: list[_Waiter] = []
        self._context = copy_context()

    def start(self) -> None:
        """Run the target soon."""
        hub = getcurrent()
        while hub.parent is not None:
            hub = hub.parent
        asyncio.get_running_loop().call_soon(greenlet(self._run, parent=hub).switch)

    def is_alive(self) -> bool:
        """Return whether the target still runs."""
        return not self._ended and (self._process is None or self._process.alive)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the target."""
        if self.is_alive():
            waiter = _Waiter()
            self._joining.append(waiter)
            waiter.wait(timeout)

    def _run(self) -> None:
        try:
            if self.is_alive():
                self._context.run(self._target)
        finally:
            self._ended = True
            for waiter in self._joining:
                waiter.resume()


class Condition:
    """Stands for `threading.Condition`: only one thread runs at a time, so it locks nothing."""

    def __init__(self) -> None:
        self._waiters: deque[_Waiter] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def wait_for(self, predicate: Callable[[], object]) -> None:
        """Wait until the predicate holds."""
        while not predicate():
            waiter = _Waiter()
            self._waiters.append(waiter)
            waiter.wait()

    def notify(self) -> None:
        """Wake one thread."""
        if self._waiters:
            self._waiters.popleft().resume()


class SimpleQueue:
    """Stands for `queue.SimpleQueue`; a thread that waits wakes after `delay()` seconds."""

    delay: Callable[[], float] = staticmethod(lambda: 0.0)

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._waiter: _Waiter | None = None

    def put(self, item: object) -> None:
        """Add an item."""
        self._items.append(item)
        if self._waiter is not None:
            self._waiter.resume(type(self).delay())
            self._waiter = None

    def get(self, timeout: float | None = None) -> Any:
        """Return the oldest item; raises queue.Empty after the timeout."""
        if not self._items:
            self._waiter = _Waiter()
            self._waiter.wait(timeout)
            with suppress(IndexError):
                return self._items.popleft()
            self._waiter = None
            raise queue.Empty
        return self._items.popleft()

    def get_nowait(self) -> Any:
        """Return the oldest item; raises queue.Empty without one."""
        if not self._items:
            raise queue.Empty
        return self._items.popleft()

    @classmethod
    def __class_getitem__(cls, item: object) -> type[Self]:
        return cls
