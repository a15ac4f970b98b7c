"""Tests of the packed format: the numbers that have codes, the choice of a row's format, and decoding."""

import math
import random

import pytest
import torch
from tests.unit.engine.native.models import library
from torch import Tensor

from llama2_server.engine.model.packed_weights import (
    FLOAT16,
    FORMAT_MASK,
    TWELVE_BITS,
    TWELVE_BITS_WITH_BASES,
    PackedMatrix,
    PackedMemory,
    measure_rows,
    row_bytes,
)

BLOCK = 128
MAX_BASE = 18  # then the codes reach beyond the largest float16


@pytest.fixture(autouse=True)
def _library() -> None:
    library()


def pack(halves: Tensor) -> PackedMatrix:
    rows, width = halves.shape
    memory = PackedMemory(rows * row_bytes(FLOAT16, width))
    matrix = PackedMatrix(memory, torch.full((rows,), -1), width)
    assert matrix.pack(0, halves)
    return matrix


def row_formats(halves: Tensor) -> list[int]:
    formats = torch.empty(len(halves), dtype=torch.int64)
    assert measure_rows(halves, formats) is not None
    found: list[int] = formats.tolist()
    return found


def all_finite() -> list[float]:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    return [number for number in bits.double().tolist() if math.isfinite(number)]


def significant_bits(number: float) -> int:
    numerator = abs(int(number * 2**24))  # float16 numbers are multiples of 2^-24
    return len(bin(numerator).rstrip("0")) - 2 if numerator else 0


def has_code(number: float, base: int) -> bool:
    scaled = math.ldexp(number, 24 - base)
    return scaled.is_integer() and abs(number) < math.ldexp(0.25, base) and significant_bits(number) <= 8


def format_by_trial(row: list[float]) -> int:
    """Return the format of a row, from trying every base of every block."""
    bases = []
    for start in range(0, len(row) // BLOCK * BLOCK, BLOCK):
        block = row[start : start + BLOCK]
        fitting = [base for base in range(MAX_BASE + 1) if all(has_code(number, base) for number in block)]
        if not fitting:
            return FLOAT16
        bases.append(fitting[0])
    if not bases:
        return FLOAT16
    return TWELVE_BITS_WITH_BASES if any(bases) else TWELVE_BITS


def assert_same_bits(found: Tensor, halves: Tensor) -> None:
    assert torch.equal(found.view(torch.int32), halves.float().view(torch.int32))


def test_all_4096_values_are_coded_and_returned_bit_for_bit(instructions: str) -> None:
    """They are the float16 numbers below 0.25 with at most 8 significant bits, both zeros and subnormals included."""
    values = [number for number in all_finite() if has_code(number, 0)]
    assert len(values) == 4096
    row = torch.tensor([values], dtype=torch.float64).half()
    matrix = pack(row)
    assert (matrix.rows & FORMAT_MASK).tolist() == [TWELVE_BITS]
    assert matrix.nbytes == 4096 * 12 // 8 + 8  # and the row's entry in the table
    assert_same_bits(matrix.unpack(0, instructions), row[0])


def test_every_other_number_makes_a_row_float16_or_gives_it_a_base(instructions: str) -> None:
    """One number of each kind in a row of zeros: the row has the expected format and returns its numbers."""
    numbers = all_finite()
    halves = torch.zeros(len(numbers), BLOCK, dtype=torch.float16)
    halves[:, 77] = torch.tensor(numbers, dtype=torch.float64).half()
    expected = [format_by_trial([0.0, number] + [0.0] * (BLOCK - 2)) for number in numbers]
    assert row_formats(halves) == expected
    matrix = pack(halves)
    for row in range(0, len(numbers), 7):
        assert_same_bits(matrix.unpack(row, instructions), halves[row])


def random_block(chooser: random.Random) -> list[float]:
    """Return numbers of a random magnitude and precision, sometimes with zeros, outliers or many bits."""
    deviation = 2.0 ** chooser.uniform(-14, 6)
    bits = chooser.choice([3, 7, 8, 8, 8, 8])
    block = []
    for _ in range(BLOCK):
        mantissa, exponent = math.frexp(chooser.gauss(0, deviation))
        block.append(math.ldexp(round(mantissa * 2**bits) / 2**bits, exponent))
    for number in (0.0, -0.0, 2.0**-24, 0.25, 1.25, -3.0, 300.0, 65504.0, 1 + 2**-8):
        if chooser.random() < 0.08:
            block[chooser.randrange(BLOCK)] = number
    return block


def test_the_format_equals_trying_every_base(instructions: str) -> None:
    """On 2,000 rows of one to three blocks, with a part that does not fill a block, the formats are those by trial."""
    chooser = random.Random(0)
    found, expected = [], []
    for _ in range(2000):
        width = chooser.choice([64, BLOCK, 2 * BLOCK, 2 * BLOCK + 40, 3 * BLOCK])
        numbers = [number for _ in range(3) for number in random_block(chooser)][:width]
        halves = torch.tensor([numbers], dtype=torch.float64).half()
        expected.append(format_by_trial(halves[0].double().tolist()))
        found += row_formats(halves)
        assert_same_bits(pack(halves).unpack(0, instructions), halves[0])
    assert found == expected
    assert {expected.count(row_format) > 200 for row_format in (FLOAT16, TWELVE_BITS, TWELVE_BITS_WITH_BASES)} == {True}


def test_rows_from_bfloat16_are_all_packed() -> None:
    """N(0, 0.02) rounded to bfloat16, as Llama-2's weights, takes 12 bits per weight."""
    halves = (torch.randn(200, 4096) * 0.02).bfloat16().half()
    matrix = pack(halves)
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
    assert measure_rows(halves, torch.empty(3, dtype=torch.int64)) is None


def test_rows_are_packed_in_any_order() -> None:
    """Blocks of rows that threads pack in another order return the same numbers, and slices share the memory."""
    halves = (torch.randn(10, 256) * 0.02).bfloat16().half()
    halves[3, 4] = 1 + 2**-10
    matrix = PackedMatrix(PackedMemory(10 * row_bytes(FLOAT16, 256)), torch.full((10,), -1), 256)
    for first in (8, 0, 4, 2, 6):
        assert matrix[first : first + 2].pack(0, halves[first : first + 2])
    assert all(torch.equal(matrix.unpack(row), halves[row].float()) for row in range(10))
    assert torch.equal(matrix[3:5].unpack(0), halves[3].float())
    assert torch.equal(matrix.first_values(300), halves.view(-1)[:300])
