"""Streams that break off at random places: the joined text is exact, and the account pays for one call."""

from collections.abc import AsyncIterator

import pytest
from tests.reliability.cuts.costs import PLACES
from tests.reliability.simulation.cuts import simulate_cuts

from llama2_server.idempotency.key_accounting import KeyAccounting
from llama2_server.idempotency.run import KeyedReply, KeyRun

SEEDS = range(1, 11)
CUTS = 200  # per seed


@pytest.mark.parametrize("seed", SEEDS)
def test_cuts_in_virtual_time(seed: int) -> None:
    """2,000 cuts in all: of connections, with and without the client's text, and by restarts of the server."""
    outcome = simulate_cuts(seed, CUTS)
    assert outcome.broken == []
    assert outcome.cuts.total() == CUTS
    kinds = {kind for kind, _ in outcome.cuts}
    assert kinds == {"connection", "client", "SIGKILL", "SIGTERM"}
    assert {place for _, place in outcome.cuts} == set(PLACES)
    assert outcome.computations > outcome.replies


def _charge_each_computation(patch: pytest.MonkeyPatch) -> None:
    def charge(self: KeyAccounting, account_id: str) -> object:
        return self._quota.charge(account_id)

    patch.setattr(KeyAccounting, "charge", charge)


def _repeat_a_character(patch: pytest.MonkeyPatch) -> None:
    deltas = KeyedReply.deltas

    async def repeated(self: KeyedReply) -> AsyncIterator[str]:
        self._resume_after = max(0, self._resume_after - 1)
        async for delta in deltas(self):
            yield delta

    patch.setattr(KeyedReply, "deltas", repeated)


def _keep_the_tokens_of_the_break(patch: pytest.MonkeyPatch) -> None:
    read = KeyRun._set_read

    def without_reader(self: KeyRun) -> None:
        tokens = None if self._accounting is None else self._accounting.read_tokens
        read(self)
        if self._accounting is not None:
            self._accounting.read_tokens = tokens

    patch.setattr(KeyRun, "_set_read", without_reader)


@pytest.mark.parametrize(
    ("plant", "broken"),
    [
        (_charge_each_computation, "units of its quota"),
        (_repeat_a_character, "instead of"),
        (_keep_the_tokens_of_the_break, "has the records"),
    ],
)
def test_a_planted_error_is_found(plant: object, broken: str) -> None:
    """Each check finds an error of the server."""
    found = simulate_cuts(1, 60, plant).broken  # type: ignore[arg-type]
    assert any(broken in line for line in found), found
