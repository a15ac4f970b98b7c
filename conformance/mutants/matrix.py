"""Run cases against the mutants of servers and clients, and report which cases do not find them."""

from collections.abc import Callable

from conformance.client_runner.cases import load_client_cases, read_client_kills
from conformance.client_runner.mutants import client_mutants, failed_client_cases
from conformance.mutants.behavior import MUTANTS
from conformance.mutants.run import MAX_KILLS, read_kills, run_mutants
from conformance.server_runner.suite import load_cases


async def run_matrix(full: bool, on_line: Callable[[str], None]) -> list[str]:
    """Run the named cases, or all cases if `full`, and return each problem in words."""
    cases = load_cases()
    kills = read_kills()
    every = [case.name for case in cases]

    def print_mutant(name: str, failed: list[str]) -> None:
        behavior = MUTANTS[name].behavior if name else "The proxies change nothing."
        on_line(f"{name or 'correct'}: {behavior} {len(failed)} failed: {', '.join(failed[:4])}")

    wanted = {name: every if full else kills[name] for name in kills}
    found = await run_mutants(cases, {"": every, **wanted}, print_mutant)
    problems = [f"a correct server fails {name}" for name in found.pop("")]
    client_kills = read_client_kills()
    client_every = [case.name for case in load_client_cases()]
    client_found = {}
    for name in client_mutants():
        client_found[name] = await failed_client_cases(name, client_every if full else client_kills[name])
        on_line(f"{name}: {len(client_found[name])} failed: {', '.join(client_found[name][:4])}")
    for all_kills, all_found in ((kills, found), (client_kills, client_found)):
        for name, failed in all_found.items():
            problems += [f"{name} is not found by {case}" for case in all_kills[name] if case not in failed]
            if len(failed) > MAX_KILLS:
                problems.append(f"{name} fails {len(failed)} cases; one behavior fails at most {MAX_KILLS}")
    return problems
