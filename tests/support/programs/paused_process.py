"""A server process that pauses before an import: `python -m tests.support.programs.paused_process MODULE FLAGS`.

It prints a line, and waits in this import until a signal ends it.
"""

import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from llama2_server.cli.signals import exit_on_signals

PAUSED = "paused"


class PausingFinder:
    """Finder of modules that pauses at one import, and finds none."""

    def __init__(self, module: str) -> None:
        self._module = module

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Pause if it is that import."""
        if name == self._module:
            print(PAUSED, flush=True)
            threading.Event().wait()
        return None


if __name__ == "__main__":
    sys.meta_path.insert(0, PausingFinder(sys.argv.pop(1)))
    exit_on_signals()
    from llama2_server.__main__ import main

    main()
