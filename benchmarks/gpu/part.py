"""The process of one part: `python -m benchmarks.gpu.part NAME SHAPE DEVICE ROWS` prints its results."""

import os
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.part_process import print_results


def measure(name: str, shape: str, device: str, rows: str) -> Iterator[tuple[str, Any]]:
    """Yield the results of a part; units are seconds and bytes."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it during its import
    from benchmarks.gpu.parts import PARTS, about
    from benchmarks.gpu.target import Target

    target = Target(shape, device, int(rows))
    if name == "about":
        yield "about", about(target)
    else:
        yield from PARTS[name].measure(target)


if __name__ == "__main__":
    print_results(lambda: measure(*sys.argv[1:]))
