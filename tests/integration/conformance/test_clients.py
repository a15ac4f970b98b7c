"""The conformance kit's cases for clients: adapters, and client mutants that the cases must find."""

import asyncio
import tempfile
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from conformance.client_runner.adapters import FILE, AdapterEntry, read_adapters
from conformance.client_runner.cases import load_client_cases, read_client_kills
from conformance.client_runner.mutants import client_mutants, failed_client_cases
from conformance.client_runner.protocol import canonical
from conformance.client_runner.run import Adapter, run_client_cases, running_adapter
from tests.integration.examples.clients.client_program import lines_of_code, require_toolchain

ADAPTERS = FILE.parent
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


def test_answers_have_one_form() -> None:
    """Numbers of codes and finish reasons get their names, and fields are sorted; an unknown number has no name."""
    answer = {"code": 3, "finish_reason": 2, "seed": 2**64 - 1, "fields": ["top_p", "stop"]}
    named = {"code": "INVALID_ARGUMENT", "finish_reason": "STOP_SEQUENCE", "seed": f"{2**64 - 1}"}
    assert canonical(answer) == {**named, "fields": ["stop", "top_p"]}
    assert canonical({"code": 77, "finish_reason": 99}) == {"code": "UNKNOWN", "finish_reason": "99"}
    texts = {"code": "OK", "finish_reason": "FINISH_REASON_MAX_TOKENS", "seed": "7", "text": ""}
    assert canonical(texts) == {**texts, "finish_reason": "MAX_TOKENS"}
    assert canonical("no object") == "no object"


def test_adapters_are_short() -> None:
    """Each folder has one program of at most 60 lines without blank lines, comments and imports, and an entry."""
    programs = [path for path in ADAPTERS.glob("*/*") if path.is_file()]
    assert len(programs) >= len(read_adapters())
    assert not {path.name: len(lines_of_code(path)) for path in programs if len(lines_of_code(path)) > 60}


@pytest.mark.parametrize("entry", read_adapters(), ids=lambda entry: entry.name)
@pytest.mark.timeout(300)  # builds download packages
async def test_adapter_conforms(entry: AdapterEntry) -> None:
    """Each adapter passes every case."""
    require_toolchain(entry.name, entry.needs)
    with tempfile.TemporaryDirectory() as folder:
        command = entry.build(Path(folder))

        def open_client(address: str) -> AbstractAsyncContextManager[Adapter]:
            return running_adapter(command, address)

        results = await run_client_cases(open_client, load_client_cases(), entry.known_failures)
    assert not {result.case.name: result.differences for result in results if not result.ok}
