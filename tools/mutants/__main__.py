"""Mutate modules of the server, and report the share of the mutants that their tests find: `make mutants`.

The sample is fixed: a change of one function leaves the mutants of the others in it. The command exits with 1 if the
tests find less than the goal.
"""

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.mutants.executed import FailingTest, TestFile, fastest_first, measured
from tools.mutants.mutations import Mutant, mutants
from tools.mutants.runner import ROOT, copied_repository, first_failure
from tools.mutants.suites import TESTS, files_of, modules, package_of

SAMPLE = 300
GOAL_PERCENT = 90
LIMIT_SECONDS, LIMIT_RATIO = 60, 5
"""A test file's time limit is the first plus the second times its usual time; one that takes longer hangs."""


def main() -> int:
    """Test the mutants of the command line, and return the exit code."""
    parser = argparse.ArgumentParser(prog="make mutants ARGS=…", description="Share of mutants that tests find.")
    parser.add_argument("--first", type=int, default=SAMPLE, help=f"only the first of the {SAMPLE} mutants")
    parser.add_argument("--package", choices=sorted(TESTS), help="only the mutants of one package")
    parser.add_argument("--jobs", type=int, default=1, help="mutants that are tested at the same time")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants", help="folder of the survivors' list")
    parser.add_argument("--continue", action="store_true", dest="continued", help="keep the results that --out has")
    options = parser.parse_args()
    results = options.out / "results.txt"
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.continued:
        results.unlink(missing_ok=True)
    found = sorted((one for path in modules(ROOT) for one in mutants(ROOT, path)), key=lambda mutant: mutant.order)
    chosen = [one for one in found[:SAMPLE] if options.package in (None, package_of(one.path))][: options.first]
    known = dict(_kept(results))
    untested = [one for one in chosen if one.order not in known]
    files = {package: files_of(ROOT, package) for package in {package_of(one.path) for one in untested}}
    try:
        all_files = sorted({file for of_package in files.values() for file in of_package})
        tests = measured(ROOT, all_files, options.out / "executed.json", options.jobs)
    except FailingTest as error:
        sys.exit(str(error))

    def survives_its_tests(mutant: Mutant) -> bool:
        chosen_tests = [one for one in tests if one.path in files[package_of(mutant.path)]]
        return survives(mutant, fastest_first(chosen_tests, mutant))

    with ThreadPoolExecutor(options.jobs) as workers, results.open("a", encoding="utf-8") as file:
        for one, survived in zip(untested, workers.map(survives_its_tests, untested), strict=True):
            known[one.order] = survived
            print(one.order, "survived" if survived else "found", file=file, flush=True)
    survivors = [one for one in chosen if known[one.order]]
    path = options.out / "survivors.txt"
    path.write_text("".join(f"{line}\n" for line in sorted(map(str, survivors))), encoding="utf-8")
    percent = 100 * (len(chosen) - len(survivors)) / max(1, len(chosen))
    print(f"{percent:.0f}% of {len(chosen)} mutants were found, the goal is {GOAL_PERCENT}%; survivors: {path}")
    return 0 if percent >= GOAL_PERCENT else 1


def _kept(results: Path) -> Iterator[tuple[str, bool]]:
    """Yield the order of each mutant that a run has tested, and whether it survived."""
    if results.exists():
        for line in results.read_text(encoding="utf-8").splitlines():
            order, result = line.split()
            yield order, result == "survived"


def survives(mutant: Mutant, tests: list[TestFile]) -> bool:
    """Return whether the tests pass with the mutant, and print it."""
    failure = None
    with copied_repository() as copy:
        (copy / mutant.path).write_text(mutant.source, encoding="utf-8")
        for one in tests:
            failure = first_failure(copy, [one.path], LIMIT_SECONDS + LIMIT_RATIO * one.seconds)
            if failure:
                break
    reason = failure or (f"{len(tests)} test files pass" if tests else "no test executes it")
    print(f"{'found' if failure else 'SURVIVED':<9} {mutant} ({reason})", flush=True)
    return failure is None


if __name__ == "__main__":
    sys.exit(main())
