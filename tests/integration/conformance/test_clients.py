"""The conformance kit's cases for clients: adapters, and client mutants that the cases must find."""

import asyncio
import tempfile
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from conformance.client_runner.adapters import AdapterEntry, read_adapters
from conformance.client_runner.cases import load_client_cases, read_client_kills
from conformance.client_runner.mutants import client_mutants, failed_client_cases
from conformance.client_runner.run import Adapter, run_client_cases, running_adapter

MAX_KILLS = 15


async def test_every_mutant_is_found_and_every_case_finds_one() -> None:
    """Each mutant fails the cases that are named for it, at most 15, and each case is named for a mutant."""
    cases = load_client_cases()
    kills = read_client_kills()
    assert kills.keys() == client_mutants().keys()
    assert len(kills) >= 20
    assert len(cases) >= 25
    assert {case.name for case in cases} == set().union(*kills.values())
    assert not {name: len(named) for name, named in kills.items() if not 1 <= len(named) <= MAX_KILLS}
    failed = await asyncio.gather(*(failed_client_cases(name, kills[name]) for name in kills))
    assert dict(zip(kills, failed, strict=True)) == kills


async def test_correct_client_passes() -> None:
    """The client that the mutants change passes every case."""
    assert not await failed_client_cases("", [case.name for case in load_client_cases()])


@pytest.mark.parametrize("entry", read_adapters(), ids=lambda entry: entry.name)
@pytest.mark.timeout(300)  # builds download packages
async def test_adapter_conforms(entry: AdapterEntry) -> None:
    """Each adapter passes every case."""
    if entry.missing:
        pytest.skip(f"NOT TESTED WITH {entry.name}: {', '.join(entry.missing)} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        command = entry.build(Path(folder))

        def open_client(address: str) -> AbstractAsyncContextManager[Adapter]:
            return running_adapter(command, address)

        results = await run_client_cases(open_client, load_client_cases())
    assert not {result.case.name: result.differences for result in results if not result.ok}
