"""Calls with idempotency keys to two replicas in virtual time, with lost replies and SIGKILLs: one record per key."""

import pytest
from tests.reliability.simulation.keyed import KeyedOutcome, simulate_keys
from tests.reliability.simulation.stores import SimulatedKeyStore

from llama2_server.usage.keys.records import HeldKey, KeyRecord

SEEDS = (1, 2, 3)
CALLS = 600  # per seed; `make simulation ARGS='--keyed-calls 100000'` makes more


def test_records_are_keys() -> None:
    """Replay a failing seed: `python -m tests.reliability.simulation --seed SEED --keyed-calls 600`."""
    total = KeyedOutcome()
    for seed in SEEDS:
        outcome = simulate_keys(seed, CALLS)
        assert outcome.broken == [], f"seed {seed}"
        assert outcome.records == outcome.keys, f"seed {seed}"
        total.add(outcome)
    assert total.keys > 500
    assert total.lost_replies > 500
    assert total.kills > 10


def test_replicas_that_share_no_keys_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a store that grants each claim, both replicas record calls of one key."""

    async def grant(self: SimulatedKeyStore, record: KeyRecord, server: str, now: object) -> HeldKey:
        return HeldKey(record, server)

    monkeypatch.setattr(SimulatedKeyStore, "claim", grant)
    outcome = simulate_keys(1, 200)
    assert outcome.records > outcome.keys
    assert any("has no key" in line for line in outcome.broken)
