"""Mixed traffic for 20 minutes, and the drift of memory, file descriptors and threads: `make soak`.

It exits with 1 if one of them grows with the requests, or if a call has an unexpected status.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.reliability.soak.plot import draw_plot
from tests.reliability.soak.samples import Sample, after_warm_up, drifts, exceeded, take_samples
from tests.reliability.soak.traffic import UNEXPECTED, Client
from tests.support.processes import card_file, server
from tests.support.repository import ROOT

from llama2_server.admission.keys.keys_file import new_key

CLIENTS = 8
ACCOUNTS = 4
MIN_REQUESTS = 5000
"""Fewer requests show no drift."""


def main() -> int:
    """Run the soak test of the command line, and return the exit code."""
    parser = argparse.ArgumentParser(prog="make soak ARGS=…", description="Drift of memory, files and threads.")
    parser.add_argument("--minutes", type=float, default=20, help="duration")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="seed of the calls; default: time")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "soak", help="folder of the plot and the samples")
    options = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        samples = asyncio.run(soak(Path(folder), 60 * options.minutes, options.seed, counts))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "samples.json").write_text(json.dumps([asdict(sample) for sample in samples]), encoding="utf-8")
    draw_plot(samples, options.out / "soak.png")
    return report(samples, counts, options)


async def soak(folder: Path, seconds: float, seed: int, counts: Counter[tuple[str, str]]) -> list[Sample]:
    """Run a server and its clients, and return the samples."""
    keys = [new_key(f"account-{number}") for number in range(ACCOUNTS)]
    keys_file = folder / "keys.yaml"
    keys_file.write_text("keys:\n" + "".join(f"  {entry}\n" for _, entry in keys))
    card = card_file(folder, max_concurrent_requests=2, max_requests_per_min={"default": 10**6, "accounts": {}})
    flags = ("--card", str(card), "--weights", "demo", "--api-keys-file", str(keys_file), "--log-level", "warning")
    # A small cache is full after the warm-up.
    limits = ("--response-cache-max-bytes", str(256 * 1024))
    with server(folder, *flags, *limits) as (process, address):
        clients = [
            Client(address, keys[number % ACCOUNTS][0], random.Random(f"{seed} {number}"), counts)
            for number in range(CLIENTS)
        ]
        tasks = [asyncio.create_task(client.run()) for client in clients]
        sampling = asyncio.create_task(take_samples(process.pid, counts, seconds))
        done, _ = await asyncio.wait([sampling, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(error, asyncio.CancelledError):
                raise AssertionError("a client failed") from error
        assert sampling in done
        return sampling.result()


def report(samples: list[Sample], counts: Counter[tuple[str, str]], options: argparse.Namespace) -> int:
    """Print the figures, and return the exit code."""
    for (kind, status), count in sorted(counts.items()):
        print(f"{kind:<14} {status:<20} {count:>8,}")
    first, last, found = after_warm_up(samples)[0], samples[-1], drifts(samples)
    print(f"{last.requests:,} requests in {last.seconds / 60:.1f} minutes; after the warm-up and at the end:")
    print(f"  memory {first.memory_mb:.1f} and {last.memory_mb:.1f} MB", end=", ")
    print(f"file descriptors {first.files} and {last.files}, threads {first.threads} and {last.threads}")
    for name, value in found.items():
        print(f"  drift of {name}: {value:+.2f} per 10,000 requests")
    print(f"plot: {options.out / 'soak.png'}; seed {options.seed}")
    wrong = exceeded(found)
    wrong += [f"{count} calls ended with {status}" for (_, status), count in counts.items() if status in UNEXPECTED]
    if last.requests < MIN_REQUESTS:
        wrong.append(f"{last.requests} requests are too few to measure a drift")
    print("\n".join(f"BROKEN: {line}" for line in wrong) or "no drift beyond the limits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
