"""The number of guesses per step, and the measured cost of rows."""

import pytest

from llama2_server.engine.speculation.draft_lengths import draft_lengths
from llama2_server.engine.speculation.row_costs import FIRST_ROW_COST, RowCosts


def cost(row_cost: float) -> RowCosts:
    """Return costs that were measured with `row_cost` per additional row."""
    costs = RowCosts()
    for _ in range(60):
        costs.observe(1, 0.05)
        costs.observe(9, 0.05 * (1 + 8 * row_cost))
    return costs


def chances(chance: float, guesses: int = 15) -> list[float]:
    return [chance ** (index + 1) for index in range(guesses)]


def test_likely_guesses_are_checked() -> None:
    """A draft that is surely right is checked completely; one that is surely wrong, not at all."""
    assert draft_lengths([chances(0.99)], cost(0.1).relative, 16) == [15]
    assert draft_lengths([chances(0.02)], cost(0.1).relative, 16) == [0]


def test_the_length_follows_the_cost_of_rows() -> None:
    """The same draft is checked further where an additional row costs less."""
    lengths = [draft_lengths([chances(0.8)], cost(share).relative, 16)[0] for share in (0.02, 0.1, 0.3, 1.0)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1] == 0


def test_sequences_share_the_rows() -> None:
    """The likeliest guesses come first, and all rows together stay within the limit."""
    lengths = draft_lengths([chances(0.9), chances(0.05), chances(0.9)], cost(0.05).relative, 16)
    assert min(lengths[0], lengths[2]) > 4 > lengths[1] == 0
    assert abs(lengths[0] - lengths[2]) <= 1
    assert sum(lengths) + 3 <= 16
    assert draft_lengths([chances(0.99)] * 8, cost(0.01).relative, 16) == [1] * 8


@pytest.mark.parametrize("sequences", [16, 17, 40])
def test_many_sequences_leave_no_rows_for_guesses(sequences: int) -> None:
    """Requests need the rows more than guesses do."""
    assert draft_lengths([chances(0.99)] * sequences, cost(0.01).relative, 16) == [0] * sequences


def test_costs_are_learned() -> None:
    """The relative cost approaches what was measured, and rows fit into a time."""
    costs = cost(0.25)
    assert costs.relative(9) == pytest.approx(3.0, rel=0.1)
    assert costs.rows_within(0.15) == pytest.approx(9, abs=1)
    assert costs.rows_within(0.001) == 0


def test_without_measurements_costs_return_to_the_first_value() -> None:
    """An unusual measurement does not decide forever: later, guesses are tried again."""
    costs = cost(1.0)
    assert costs.relative(2) - 1 > 5 * FIRST_ROW_COST
    for _ in range(4000):
        costs.observe(1, 0.05)
    assert costs.relative(2) - 1 == pytest.approx(FIRST_ROW_COST, rel=0.05)


def test_a_step_that_lost_its_core_hardly_counts() -> None:
    """One step that takes a second does not end prompt lookup."""
    costs = cost(0.1)
    costs.observe(4, 1.0)
    assert costs.relative(4) < 1.5


def test_nothing_is_known_before_the_first_step() -> None:
    """No number of rows is promised to fit into a time."""
    assert RowCosts().rows_within(10.0) == 0
