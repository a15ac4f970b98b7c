"""Compare prompt lookup with plain decoding on many seeded cases.

    python -m tests.reliability.speculation --cases 10000

The cases use two checkpoints of a few hundred kB: one whose replies repeat passages, and one with random weights. They
run with each family of native kernels that the processor supports.
"""

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from tests.reliability.speculation.cases import CONTEXT, CYCLE, VOCAB, Pair, families, some_cases
from tools.make_checkpoint import Shape, make_checkpoint


def main() -> None:
    """Run the cases; the exit code is 1 if a reply differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    differences: list[str] = []
    cases = some_cases(arguments.seed, arguments.cases // 2)
    for cycle, kernels in product((CYCLE, 0), families()):
        with tempfile.TemporaryDirectory() as folder:
            shape = Shape(vocab=VOCAB, context=CONTEXT, cycle=cycle)
            pair = Pair(make_checkpoint(Path(folder), shape), cpu_kernels=kernels)
            differences += pair.differences(cases)
            pair.close()
        print(f"{kernels}, cycle {cycle}: with prompt lookup {pair.counts}; plain {pair.plain_counts}")
    print(*differences, f"{2 * len(cases)} cases per family, {len(differences)} differences", sep="\n")
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
