"""Simulate, and check the histories: `python -m tests.reliability.simulation --help`."""

import argparse
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

from tests.reliability.simulation.history import History
from tests.reliability.simulation.keyed import CALLS_PER_SEED, KeyedOutcome, simulate_keys
from tests.reliability.simulation.model.rules import RULES, judge
from tests.reliability.simulation.run import REQUESTS_PER_SEED, fault_names, for_seeds, simulate, summary

SEEDS_PER_LINE = 50


def main() -> int:
    """Run the command; return 1 if a history violates the model, or many histories prove too little."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="The first seed; alone, the only one.")
    parser.add_argument("--requests", type=int, help="Number of requests in total, over as many seeds as necessary.")
    parser.add_argument("--keyed-calls", type=int, help="Number of calls with idempotency keys, instead of requests.")
    parser.add_argument("--processes", type=int, default=2, help="Number of processes that simulate.")
    parser.add_argument("--faults", help="Names of the possible faults, separated by commas; none for no fault.")
    parser.add_argument("--save", type=Path, help="File for the history of the seed.")
    parser.add_argument("--check", type=Path, help="File with a saved history to check, without a simulation.")
    options = parser.parse_args()
    if options.check is not None:
        return _report([judge(History.load(options.check)).violations])
    if options.keyed_calls is not None:
        return _run_keyed(options.seed, options.keyed_calls, options.processes)
    if options.requests is None:
        history = simulate(options.seed, REQUESTS_PER_SEED, fault_names(options.faults))
        if options.save is not None:
            history.save(options.save)
        print(f"seed {options.seed}: {len(history.events)} events, digest {history.digest()}")
        return _report([judge(history).violations])
    return _run_all(options.seed, options.requests, options.processes, options.faults)


def _run_all(first_seed: int, requests: int, processes: int, faults: str | None) -> int:
    started_at, failed = time.monotonic(), 0
    seeds = range(first_seed, first_seed + -(-requests // REQUESTS_PER_SEED))
    codes: Counter[str] = Counter()
    raised: Counter[str] = Counter()
    met: Counter[str] = Counter()
    broken = 0
    for seed, result in for_seeds(partial(summary, fault_names(faults)), seeds, processes):
        found, seed_codes, seed_raised = result
        codes += seed_codes
        raised += seed_raised
        met += found.met
        broken += found.broken_promises
        if found.violations:
            failed += 1
            print(f"seed {seed} fails; replay it with: python -m tests.reliability.simulation --seed {seed}")
            _report([found.violations])
        if (seed + 1 - first_seed) % SEEDS_PER_LINE == 0:
            print(f"{codes.total()} requests after {time.monotonic() - started_at:.0f} s", flush=True)
    seconds = time.monotonic() - started_at
    total = codes.total()
    print(f"{total} requests, {len(seeds)} seeds, {seconds:.0f} s, {total / seconds:.0f} requests per second")
    print("codes:", ", ".join(f"{code} {count}" for code, count in codes.most_common()))
    print("faults:", ", ".join(f"{name} {count}" for name, count in sorted(raised.items())))
    print("events that each rule judged:", ", ".join(f"{rule.__name__} {met[rule.__name__]}" for rule in RULES))
    returned = met["retry_times_are_kept"]
    print(f"retry times: {returned} calls returned in time, {broken} were rejected for the same reason")
    print(f"seeds that fail: {failed}")
    proven = all(met[rule.__name__] for rule in RULES) and broken < 0.01 * returned
    return int(failed > 0 or not proven)


def _run_keyed(first_seed: int, calls: int, processes: int) -> int:
    """Simulate calls with keys; return 1 if a key does not have exactly one record."""
    started_at, total = time.monotonic(), KeyedOutcome()
    per_seed = min(calls, CALLS_PER_SEED)
    seeds = range(first_seed, first_seed + -(-calls // per_seed))
    for seed, outcome in for_seeds(partial(simulate_keys, calls=per_seed), seeds, processes):
        total.add(outcome)
        if outcome.broken:
            replay = f"python -m tests.reliability.simulation --seed {seed} --keyed-calls {per_seed}"
            print(f"seed {seed} fails; replay it with: {replay}")
            _report([outcome.broken])
    print(
        f"{total.calls} calls, {len(seeds)} seeds, {time.monotonic() - started_at:.0f} s: {total.keys} keys, "
        f"{total.records} records, {total.lost_replies} lost replies, {total.kills} SIGKILLs, "
        f"{total.billed} billed recomputations"
    )
    print("codes:", ", ".join(f"{code} {count}" for code, count in total.results.most_common()))
    return int(bool(total.broken) or total.records != total.keys)


def _report(found: list[list[str]]) -> int:
    lines = [line for one in found for line in one]
    for line in lines[:30]:
        print(f"  {line}")
    print(f"{len(lines)} violations")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
