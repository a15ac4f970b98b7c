"""The text cases against programs that this repository did not write."""

from importlib.util import find_spec

import pytest
from conformance.peers.run import KNOWN_DIFFERENCES, PEERS, run_peer
from conformance.server_runner.suite import load_cases

PACKAGES = {"transformers": ("transformers",), "llama.cpp": ("gguf", "xllamacpp")}


@pytest.mark.parametrize("name", PEERS)
async def test_a_peer_differs_only_as_recorded(name: str) -> None:
    """Each case passes, or is a recorded difference with its reason; a recorded difference that is gone fails."""
    if missing := [package for package in PACKAGES[name] if find_spec(package) is None]:
        pytest.skip(f"NOT TESTED WITH {name}: {', '.join(missing)} is not installed")
    results = await run_peer(name)
    assert len(results) == 14
    assert not {result.case.name: result.differences for result in results if not result.ok}


def test_recorded_differences_name_cases() -> None:
    """Each recorded difference is one of the text cases, and most cases pass."""
    names = {case.name for case in load_cases() if case.name.startswith("text/")}
    assert all(set(known) < names and len(known) < len(names) / 2 for known in KNOWN_DIFFERENCES.values())
