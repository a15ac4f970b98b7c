"""Faults that tests inject into named functions."""

import threading
from typing import Any

import pytest


class InjectedFault(Exception):
    """The exception of an injected fault."""


class FaultPoint:
    """A function that raises InjectedFault for its next `count` calls after `arm`, and otherwise works as before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: Any, name: str) -> None:
        original = getattr(target, name)
        self.raised = 0
        self._left = 0
        self._lock = threading.Lock()

        def function(*args: Any, **options: Any) -> Any:
            with self._lock:
                raises = self._left > 0
                self._left -= raises
                self.raised += raises
            if raises:
                raise InjectedFault(name)
            return original(*args, **options)

        monkeypatch.setattr(target, name, function)

    def arm(self, count: int = 1) -> None:
        """Let the next `count` calls fail."""
        with self._lock:
            self._left = count

    def disarm(self) -> None:
        """Let all calls work again."""
        self.arm(0)
