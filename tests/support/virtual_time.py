"""An event loop whose clock jumps to the next timer instead of waiting: hours in the queue take milliseconds."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


MAX_TURNS_WITHOUT_TIME = 100_000
"""Turns of the loop at one moment, after which tasks are said to wake each other for ever."""


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that never sleeps: a timeout moves the clock."""

    now = 0.0
    _turns = 0
    """Turns of the loop since the clock last moved."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        self._turns += 1
        if not events:
            if timeout is None:
                raise RuntimeError("deadlock: every task waits and no timer is set")
            if timeout > 0:
                self.now += timeout
                self._turns = 0
        if self._turns > MAX_TURNS_WITHOUT_TIME:
            self._turns = 0
            raise RuntimeError(f"livelock: tasks run at {self.now:.6f} s for ever, and no time passes")
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` is virtual and starts at 0."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run_virtual(main: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine in virtual time, and return its result."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
