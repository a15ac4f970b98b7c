"""Two replicas in virtual time, with faults; their history is checked against the model of the service."""

from dataclasses import replace
from pathlib import Path

import pytest
from tests.reliability.simulation.history import History
from tests.reliability.simulation.model import violations
from tests.reliability.simulation.planted import PLANTED
from tests.reliability.simulation.run import simulate
from tests.reliability.simulation.world import Shape

SEEDS = range(1, 11)
REQUESTS = 2000
BUSY = Shape(
    accounts=5,
    clients=60,
    per_minute=600,
    slots=1,
    caches=False,
    shares_quota=False,
    forwards=True,
    pause_seconds=0.5,
    settings={"max_queue_size": 16, "queue_timeout_seconds": 300, "engine_step_timeout_seconds": 10},
)
CASES = Path(__file__).parent / "simulation" / "cases"
FOUND = {"a-dropped-record.jsonl.gz": ["one_record_per_request", "metrics_are_exact"]}
"""By file, the rules that it violates."""


@pytest.mark.parametrize("seed", SEEDS)
def test_simulation(seed: int) -> None:
    """Replay a failing seed: `python -m tests.reliability.simulation --seed SEED`."""
    assert violations(simulate(seed, REQUESTS)) == []


def test_a_seed_replays() -> None:
    """The same seed has the same history, with every fault point."""
    assert simulate(77, 300).digest() == simulate(77, 300).digest() != simulate(78, 300).digest()


@pytest.mark.parametrize("name", PLANTED)
def test_the_model_finds_a_planted_error(name: str) -> None:
    """Without the error, the same simulation violates no rule."""
    planted = PLANTED[name]
    settings = {**BUSY.settings, "max_queue_size": planted.max_queue_size}
    shape = replace(BUSY, accounts=planted.accounts, per_minute=planted.per_minute, settings=settings)
    found = violations(simulate(1, planted.requests, planted.faults, planted.plant, shape))
    assert any(line.startswith(planted.rule) for line in found), found
    assert violations(simulate(1, planted.requests, planted.faults, shape=shape)) == []


def test_a_saved_history_is_checked_again(tmp_path: Path) -> None:
    """Each file in `cases` is the history of an error that the simulation found; its violations stay the same."""
    cases = {path.name: violations(History.load(path)) for path in CASES.iterdir()}
    assert {name: [line.partition(":")[0] for line in lines] for name, lines in cases.items()} == FOUND
    history = simulate(1, 50)
    history.save(tmp_path / "history.jsonl")
    assert History.load(tmp_path / "history.jsonl").digest() == history.digest()
