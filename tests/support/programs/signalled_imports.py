"""A program whose copies get a signal: `python -m tests.support.programs.signalled_imports MODULE STRIDE ARGUMENTS`.

It runs the function `main` of MODULE up to the event loop. At the first 100 imports, and at each STRIDE-th one after
them, it forks; the copy sends SIGINT or SIGTERM to itself. Prints what each copy wrote to stderr, and its exit code, as
JSON.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ALWAYS = 100


class ForkingFinder:
    """Finder of modules that forks at imports, and finds none."""

    def __init__(self, stride: int) -> None:
        self._stride = stride
        self._imports = 0
        self.results: list[tuple[str, int, str, int]] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Fork if it is one of the imports, and record the end of the copy."""
        self._imports += 1
        if self._imports <= ALWAYS or self._imports % self._stride == 0:
            self.results.append((name, *end_of_copy(SIGNALS[self._imports // self._stride % 2])))
        return None


def end_of_copy(number: signal.Signals) -> tuple[int, str, int]:
    """Send a signal to a copy of this process, and return the signal, the copy's errors and its exit code."""
    reader, writer = os.pipe()
    copy = os.fork()
    if copy == 0:
        os.dup2(writer, 2)
        os.kill(os.getpid(), number)
        os._exit(0)  # the signal was ignored
    os.close(writer)
    with os.fdopen(reader) as errors:
        text = errors.read()
    return number, text, os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])


def end_before_the_loop(runner: asyncio.Runner, work: Coroutine[Any, Any, Any]) -> int:
    """Return the exit code 0 instead of running the work."""
    work.close()
    return 0


if __name__ == "__main__":
    module, finder = sys.argv.pop(1), ForkingFinder(int(sys.argv.pop(1)))
    asyncio.Runner.run = end_before_the_loop  # type: ignore[assignment]
    run = import_module(module).main
    # Both packages were imported, and the handlers exist after `main` has begun.
    sys.meta_path.insert(0, finder)
    try:
        run()
    finally:
        sys.meta_path.remove(finder)
        print(json.dumps(finder.results), flush=True)
