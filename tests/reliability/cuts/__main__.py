"""Cut the streams of real servers: `python -m tests.reliability.cuts --seed 7` repeats the cuts of a seed."""

import argparse
import asyncio
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.reliability.cuts.run import CUTS, cut_streams
from tests.support.forks import Forks
from tests.support.servers.postgres_server import running_postgres


def main() -> int:
    """Run the command; return 1 if a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.cuts", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="seed of the requests and the cuts")
    parser.add_argument("--cuts", type=int, default=CUTS, help="number of cuts")
    parser.add_argument("--replicas", type=int, choices=(1, 2), default=1, help="2: a second replica with PostgreSQL")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        forks = stack.enter_context(Forks.running(folder))
        url = stack.enter_context(running_postgres()).new_database() if options.replicas == 2 else None
        outcome = asyncio.run(cut_streams(options.seed, forks, folder, url, options.cuts))
        for (kind, place), count in sorted(outcome.cuts.items()):
            print(f"{count:>5} {kind}, {place}")
        print(f"{outcome.cuts.total()} cuts of {outcome.replies} replies", *outcome.broken, sep="\n")
        if outcome.broken:
            print(forks.log.read_text(encoding="utf-8"))
    return int(bool(outcome.broken))


if __name__ == "__main__":
    sys.exit(main())
