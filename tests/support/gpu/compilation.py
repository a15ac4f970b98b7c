"""Programs that compile kernels for several compute capabilities, in parallel and without Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CAPABILITIES = (80, 89, 90, 100)
"""A100; RTX 40 and L4; H100 and H200; B200."""


class Compilations:
    """The running programs by capability."""

    def __init__(self, program: str, cache: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
        self._processes = {
            capability: subprocess.Popen(
                [sys.executable, "-c", program, str(capability)], env=environment, stderr=subprocess.PIPE, text=True
            )
            for capability in CAPABILITIES
        }

    def check(self, capability: int) -> None:
        """Wait for the program; raise an AssertionError with its messages if it failed."""
        process = self._processes[capability]
        _, errors = process.communicate()
        assert process.returncode == 0, errors

    def close(self) -> None:
        """End the programs that still run."""
        for process in self._processes.values():
            if process.returncode is None:
                process.kill()
                process.communicate()


@contextmanager
def compilations(program: str, cache: Path) -> Iterator[Compilations]:
    """Run a program for each capability, which is its argument."""
    running = Compilations(program, cache)
    try:
        yield running
    finally:
        running.close()
