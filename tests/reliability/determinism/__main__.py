"""Equal fingerprints give equal texts: `make determinism`.

It exits with 1 if texts of equal fingerprints differ.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.reliability.determinism.comparison import FINGERPRINTS, Report, compare
from tests.reliability.determinism.texts import Run, compute

TEXTS = 100_000


def main() -> int:
    """Compare texts, or compute those of one run for the comparison of another process; return the exit code."""
    parser = argparse.ArgumentParser(prog="make determinism ARGS=…", description="Texts of equal fingerprints.")
    parser.add_argument("--texts", type=int, default=TEXTS, help="number of texts, over all runs")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(asdict(compute(Run(**json.loads(options.run)), options.texts, options.folder))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return report(compare(options.texts, Path(folder), print))


def report(result: Report) -> int:
    """Print the result and return the exit code."""
    for problem in result.problems[:20]:
        print(problem)
    print(
        f"{result.texts} texts, {result.fingerprints} fingerprints: "
        f"{len(result.problems)} texts differ from one of an equal fingerprint"
    )
    return int(bool(result.problems) or result.fingerprints != FINGERPRINTS)


if __name__ == "__main__":
    sys.exit(main())
