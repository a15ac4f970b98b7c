"""Wrong servers: the cases must find each of them."""

import asyncio
import contextlib
import os
import signal
import sys

import pytest
from conformance.mutants.behavior import MUTANTS
from conformance.mutants.run import MAX_KILLS, read_kills, run_mutants
from conformance.server_runner.suite import load_cases


def test_every_case_finds_a_mutant() -> None:
    """Each mutant has 1 to 15 cases that must find it, and each case is named for a mutant."""
    kills = read_kills()
    assert kills.keys() == MUTANTS.keys()
    assert len(kills) >= 60
    assert not {name: len(cases) for name, cases in kills.items() if not 1 <= len(cases) <= MAX_KILLS}
    assert {case.name for case in load_cases()} == set().union(*kills.values())
    assert all(mutant.behavior.endswith(".") for mutant in MUTANTS.values())


@pytest.mark.timeout(600)  # two minutes on two idle cores
async def test_mutants_are_found_by_their_cases() -> None:
    """The cases that are named for a mutant fail; without a mutant, the proxies change nothing."""
    kills = read_kills()
    cases = load_cases()
    failed = await run_mutants(cases, {"": [case.name for case in cases], **kills}, lambda *_: None)
    assert failed.pop("") == []
    survived = {name: sorted(set(kills[name]) - set(found)) for name, found in failed.items()}
    survived = {name: names for name, names in survived.items() if names}
    # Some cases depend on calls that meet in time, which a busy machine can prevent: these are tried once more, alone.
    again = await run_mutants(cases, survived, lambda *_: None) if survived else {}
    assert not {name: names for name, names in survived.items() if set(names) - set(again[name])}


async def test_sigterm_stops_the_servers() -> None:
    """SIGTERM ends a run, as Ctrl-C does, and leaves no server behind."""
    # Every process of the run inherits the pipe's writing end as its stdin, so the pipe ends with the last of them.
    read_end, write_end = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "conformance", "mutants"),
        stdin=write_end,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(write_end)
    try:
        assert process.stdout is not None
        assert await process.stdout.readline()  # a mutant has run, so the servers exist
        process.terminate()
        assert await process.wait() == 128 + signal.SIGTERM
        async with asyncio.timeout(60):
            assert await asyncio.to_thread(os.read, read_end, 1) == b""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        os.close(read_end)
