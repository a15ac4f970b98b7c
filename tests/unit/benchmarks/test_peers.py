import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.engines.peers import PEERS, chosen, groups, interpreter
from benchmarks.engines.under_test import NotRun, Worker
from benchmarks.measurement.interleaved_runs import Case, Ground, Rounds
from benchmarks.prompts import Prompts
from benchmarks.workers.protocol import Setup
from tools.make_checkpoint import Shape, make_checkpoint

PEER = replace(PEERS[0], copies=1.0)


def test_peers_are_chosen_by_words() -> None:
    """Of their names; `all` and `none` are words too."""
    assert [peer.name for peer in chosen("llama.cpp,float32")] == [
        "llama.cpp F16",
        "llama.cpp BF16",
        "CTranslate2 float32",
    ]
    assert chosen("all") == list(PEERS)
    assert chosen("none") == []


def test_what_is_not_installed_is_said() -> None:
    """A peer's Python is one that has all it needs."""
    assert interpreter(replace(PEER, needs=("json",)), {}) == (sys.executable, "")
    missing = replace(PEER, needs=("json", "no_such_library"))
    assert interpreter(missing, {PEER.family: sys.executable}) == (None, "not installed: no_such_library")


def test_groups_fit_into_memory() -> None:
    """Beside engine and service; who never fits is alone, and there is a group where there is no peer."""
    large = replace(PEER, name="large", copies=3.0)
    assert groups([PEER, large, PEER], weights_bytes=10, free_bytes=52) == [[PEER, PEER], [large]]
    assert groups([PEER, large, PEER], weights_bytes=10, free_bytes=84) == [[PEER, large, PEER]]
    assert groups([], weights_bytes=10, free_bytes=80) == [[]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made"), Shape(context=256))


def test_prompts_have_their_length(checkpoint: Path) -> None:
    """In tokens, whatever the length; and no two are the same."""
    prompts = Prompts(checkpoint, seed=0)
    assert [len(prompts.of_length(tokens).token_ids) for tokens in (32, 128, 200)] == [32, 128, 200]
    assert prompts.of_length(32) != prompts.of_length(32)


def test_a_worker_that_cannot_load(tmp_path: Path) -> None:
    """It says why, in its last line."""
    worker = Worker("engine", Setup(str(tmp_path / "nothing"), str(tmp_path), "", 64, 1, 1))
    with pytest.raises(NotRun, match="nothing"):
        worker.ready()
    worker.close()


def test_a_round_of_everyone_here(checkpoint: Path, tmp_path: Path) -> None:
    """Engine, service and transformers agree on every token, one at a time and three at once."""
    cases = [Case(32, 4), Case(16, 3, requests=3)]
    rounds = Rounds(Ground(checkpoint, tmp_path, 1, attempts=1), cases, {PEERS[0]: sys.executable})
    try:
        found = list(rounds.run())
    finally:
        rounds.close()
    names = ["engine", "service", "transformers.generate"]
    assert [figures["contender"] for figures in found] == names * 2
    assert [figures["output_tokens"] for figures in found if figures["contender"] == "engine"] == [4, 9]
    assert [figures["agreeing"] for figures in found if figures["contender"] != "engine"] == [4, 4, 3, 3]
    assert all(0 < figures["first_seconds"] < figures["total_seconds"] for figures in found)
    assert set(rounds.about()) == set(names)
    assert rounds.not_run == {}
