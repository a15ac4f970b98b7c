"""Tests of the packed format: the numbers that have codes, the choice of a row's format, and decoding."""

import math
import random

import pytest
import torch
from tests.unit.engine.native.formats import (
    BLOCK,
    all_finite,
    assert_same_bits,
    empty,
    format_by_trial,
    formats,
    has_code,
    pack,
    random_block,
)
from tests.unit.engine.native.models import library

from llama2_server.engine.model.packed_weights import FORMAT_MASK
from llama2_server.engine.model.weight_layout import FLOAT16, ROWS, TWELVE_BITS, TWELVE_BITS_WITH_BASES


@pytest.fixture(autouse=True)
def _library() -> None:
    library()


def test_all_4096_values_are_coded_and_returned_bit_for_bit(portable_instructions: str) -> None:
    """They are the float16 numbers below 0.25 with at most 8 significant bits, both zeros and subnormals included."""
    values = [number for number in all_finite() if has_code(number, 0)]
    assert len(values) == 4096
    row = torch.tensor([values], dtype=torch.float64).half()
    matrix = pack(row, ROWS)
    assert (matrix.entries & FORMAT_MASK).tolist() == [TWELVE_BITS]
    assert matrix.nbytes == 4096 * 12 // 8 + 8  # and the row's entry in the table
    assert_same_bits(matrix.unpack(0, portable_instructions), row[0])


def test_every_other_number_makes_a_row_float16_or_gives_it_a_base(portable_instructions: str) -> None:
    """One number of each kind in a row of zeros: the row has the expected format and returns its numbers."""
    numbers = all_finite()
    halves = torch.zeros(len(numbers), BLOCK, dtype=torch.float16)
    halves[:, 77] = torch.tensor(numbers, dtype=torch.float64).half()
    expected = [format_by_trial([0.0, number] + [0.0] * (BLOCK - 2)) for number in numbers]
    assert formats(halves, ROWS) == expected
    matrix = pack(halves, ROWS)
    for row in range(0, len(numbers), 7):
        assert_same_bits(matrix.unpack(row, portable_instructions), halves[row])


def test_the_format_equals_trying_every_base(portable_instructions: str) -> None:
    """On 2,000 rows of one to three blocks, with a part that does not fill a block, the formats are those by trial."""
    chooser = random.Random(0)
    found, expected = [], []
    for _ in range(2000):
        width = chooser.choice([64, BLOCK, 2 * BLOCK, 2 * BLOCK + 40, 3 * BLOCK])
        numbers = [number for _ in range(3) for number in random_block(chooser)][:width]
        halves = torch.tensor([numbers], dtype=torch.float64).half()
        expected.append(format_by_trial(halves[0].double().tolist()))
        found += formats(halves, ROWS)
        assert_same_bits(pack(halves, ROWS).unpack(0, portable_instructions), halves[0])
    assert found == expected
    assert {expected.count(row_format) > 200 for row_format in (FLOAT16, TWELVE_BITS, TWELVE_BITS_WITH_BASES)} == {True}


def test_rows_from_bfloat16_are_all_packed() -> None:
    """N(0, 0.02) rounded to bfloat16, as Llama-2's weights, takes 12 bits per weight."""
    halves = (torch.randn(200, 4096) * 0.02).bfloat16().half()
    matrix = pack(halves, ROWS)
    assert matrix.share.packed == matrix.share.total
    assert matrix.nbytes == 200 * (4096 * 12 // 8 + 8)
    assert all(torch.equal(matrix.unpack(row), halves[row].float()) for row in range(200))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 127, 200, 300, 319])
@pytest.mark.parametrize("precise", [False, True])
def test_numbers_that_are_not_finite_are_found(bad: float, position: int, precise: bool) -> None:
    """Also in a row that stays float16 for another reason, and in the part that does not fill a block."""
    halves = torch.zeros(3, 320, dtype=torch.float16)
    halves[1, 5] = 1 + 2**-10 if precise else 0.0
    halves[1, position] = bad
    assert ROWS.measure(halves, torch.empty(3, dtype=torch.int64)) is None


def test_rows_are_packed_in_any_order() -> None:
    """Blocks of rows that threads pack in another order return the same numbers, and slices share the memory."""
    halves = (torch.randn(10, 256) * 0.02).bfloat16().half()
    halves[3, 4] = 1 + 2**-10
    matrix = empty(10, 256, ROWS)
    for first in (8, 0, 4, 2, 6):
        assert matrix[first : first + 2].pack(0, halves[first : first + 2])
    assert all(torch.equal(matrix.unpack(row), halves[row].float()) for row in range(10))
    assert torch.equal(matrix[3:5].unpack(0), halves[3].float())
    assert torch.equal(matrix.first_values(300), halves.view(-1)[:300])
