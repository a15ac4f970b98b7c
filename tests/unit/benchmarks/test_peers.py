"""Selection and grouping of the peers, and the benchmark's prompts."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.engines.peers import PEERS, find_interpreter, group_by_memory, select_peers
from benchmarks.prompts import Prompts
from tools.make_checkpoint import Shape, make_checkpoint

PEER = replace(PEERS[0], copies=1.0)


def test_peers_are_selected_by_words() -> None:
    """A word selects the peers whose names contain it; `all` and `none` are also accepted."""
    assert [peer.name for peer in select_peers("llama.cpp,float32")] == [
        "llama.cpp F16",
        "llama.cpp BF16",
        "ONNX Runtime GenAI float32",
        "CTranslate2 float32",
    ]
    assert select_peers("all") == list(PEERS)
    assert select_peers("none") == []


def test_missing_modules_are_named() -> None:
    """A peer runs with a Python that has all its required modules; otherwise the reason lists the missing ones."""
    assert find_interpreter(replace(PEER, required_modules=("json",)), {}) == (sys.executable, "")
    missing = replace(PEER, required_modules=("json", "no_such_library"))
    assert find_interpreter(missing, {PEER.family: sys.executable}) == (None, "not installed: no_such_library")


def test_groups_fit_into_memory() -> None:
    """A peer that never fits gets its own group, and without peers there is one empty group."""
    large = replace(PEER, name="large", copies=3.0)
    assert group_by_memory([PEER, large, PEER], weights_bytes=10, free_bytes=52) == [[PEER, PEER], [large]]
    assert group_by_memory([PEER, large, PEER], weights_bytes=10, free_bytes=84) == [[PEER, large, PEER]]
    assert group_by_memory([], weights_bytes=10, free_bytes=80) == [[]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made"), Shape(context=256))


def test_prompts_have_exact_lengths(checkpoint: Path) -> None:
    """A prompt has the requested number of tokens, and two prompts differ."""
    prompts = Prompts(checkpoint, seed=0)
    assert [len(prompts.of_length(tokens).token_ids) for tokens in (32, 128, 200)] == [32, 128, 200]
    assert prompts.of_length(32) != prompts.of_length(32)
