import sys
from pathlib import Path

import pytest
from benchmarks.engines.peers import PEERS
from benchmarks.engines.under_test import SkippedPeer
from benchmarks.engines.worker import Worker
from benchmarks.measurement.interleaved_runs import Environment, InterleavedRuns, Workload
from benchmarks.prompts import Prompts
from benchmarks.workers.protocol import Setup
from tools.make_checkpoint import Shape, make_checkpoint

CLEAR_SEED = 43
"""With its prompts the best logit leads by 0.1 standard deviations, so the rounding of a CPU cannot change a token."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made"), Shape(context=256))


def test_worker_that_cannot_load_raises_skipped_peer(tmp_path: Path) -> None:
    """The message is the last line of the worker's log."""
    worker = Worker("engine", Setup(str(tmp_path / "nothing"), str(tmp_path), "", 64, 1, 1))
    with pytest.raises(SkippedPeer, match="nothing"):
        worker.ready()
    worker.close()


def test_round_with_engine_service_and_transformers(checkpoint: Path, tmp_path: Path) -> None:
    """All three agree on every greedy token, for one request and for three concurrent requests."""
    workloads = [Workload(32, 4, greedy=True), Workload(16, 3, requests=3, greedy=True)]
    environment = Environment(checkpoint, tmp_path, 1, attempts=1)
    runs = InterleavedRuns(environment, workloads, {PEERS[0]: sys.executable})
    runs._prompts = Prompts(checkpoint, CLEAR_SEED)
    try:
        found = list(runs.run_round())
    finally:
        runs.close()
    names = ["engine", "service", "transformers.generate"]
    assert [measurement["contender"] for measurement in found] == names * 2
    assert [one["output_tokens"] for one in found if one["contender"] == "engine"] == [4, 9]
    assert [one["agreeing"] for one in found if one["contender"] != "engine"] == [4, 4, 3, 3]
    assert all(0 < measurement["first_seconds"] < measurement["total_seconds"] for measurement in found)
    assert set(runs.describe()) == set(names)
    assert runs.not_run == {}


def test_round_of_default_requests(checkpoint: Path, tmp_path: Path) -> None:
    """The service samples the engine's tokens with the same seeds; a peer's tokens are not compared."""
    environment = Environment(checkpoint, tmp_path, 1, attempts=1)
    runs = InterleavedRuns(environment, [Workload(16, 8, requests=2)], {PEERS[0]: sys.executable})
    try:
        engine, service, peer = runs.run_round()
    finally:
        runs.close()
    assert engine["request"] == "default"
    assert engine["agreeing"] == service["agreeing"] == 8
    assert "agreeing" not in peer
    assert peer["output_tokens"] == 16
