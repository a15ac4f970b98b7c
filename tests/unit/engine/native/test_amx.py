"""Tests of the AMX kernels: the format of tiles, and products that equal an emulation of the tiles bit for bit."""

import math
import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
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
from tests.unit.engine.native.models import supported
from torch import Tensor

from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.packed_weights import FORMAT_MASK
from llama2_server.engine.model.weight_layout import (
    AMX,
    FLOAT16,
    TWELVE_BITS,
    TWELVE_BITS_WITH_BASES,
    TileLayout,
)

Floats = NDArray[np.float32]
GROUP = 16
DEPTH = 32  # inputs per tile
FLAG_BYTES = 64  # of a group of 4,096 inputs: 4 bits per tile
TILES = TileLayout()
SIXTEEN_BITS = TileLayout(twelve_bits=False)


@pytest.fixture(autouse=True)
def _amx() -> None:
    supported(AMX)


def test_all_4096_values_are_coded_and_returned_bit_for_bit() -> None:
    """Each code in each of the 16 rows of a group, and at each of 128 places of a block."""
    values = torch.tensor([number for number in all_finite() if has_code(number, 0)], dtype=torch.float64).half()
    halves = torch.stack([values.roll(257 * row) for row in range(GROUP)])
    matrix = pack(halves, TILES)
    assert (matrix.entries & FORMAT_MASK).tolist() == [TWELVE_BITS]
    assert matrix.nbytes == GROUP * 4096 * 12 // 8 + FLAG_BYTES + 8  # and the group's entry in the table
    for row in range(GROUP):
        assert_same_bits(matrix.unpack(row), halves[row])


def test_every_other_number_makes_a_group_float16_or_gives_it_bases() -> None:
    """One number of each kind in a group of zeros: the group has the expected format and returns its numbers."""
    numbers = all_finite()[::3]
    halves = torch.zeros(len(numbers), GROUP, BLOCK, dtype=torch.float16)
    halves[:, 5, 77] = torch.tensor(numbers, dtype=torch.float64).half()
    halves = halves.view(-1, BLOCK)
    expected = [format_by_trial([0.0, number] + [0.0] * (BLOCK - 2)) for number in numbers]
    assert formats(halves, TILES) == expected
    matrix = pack(halves, TILES)
    for row in range(5, len(halves), 7 * GROUP):
        assert_same_bits(matrix.unpack(row), halves[row])


def group_format_by_trial(group: list[list[float]]) -> int:
    """Return the format of a group from its rows; columns and rows that are missing are zeros."""
    rows = [format_by_trial(row + [0.0] * (-len(row) % BLOCK)) for row in group]
    return FLOAT16 if FLOAT16 in rows else max(rows)


def test_the_format_equals_trying_every_base() -> None:
    """On 300 groups of few different rows, of one to three blocks and parts of blocks, with missing rows, too."""
    chooser = random.Random(0)
    found, expected = [], []
    for _ in range(300):
        width, rows = chooser.choice([40, BLOCK, BLOCK + 64, 3 * BLOCK]), chooser.choice([GROUP, GROUP, 3])
        plain = [[0.01] * width for _ in range(rows)]
        for row in chooser.sample(range(rows), chooser.choice([0, 1, 1, 2])):
            plain[row] = [number for _ in range(3) for number in random_block(chooser)][:width]
        halves = torch.tensor(plain, dtype=torch.float64).bfloat16().clamp(-65280, 65280).half()
        if chooser.random() < 0.3:
            halves[chooser.randrange(rows), chooser.randrange(width)] = 1 + 2**-10
        expected.append(group_format_by_trial(halves.double().tolist()))
        found += formats(halves, TILES)
        assert formats(halves, SIXTEEN_BITS) == [FLOAT16]
        for layout in (TILES, SIXTEEN_BITS):
            matrix = pack(halves, layout)
            for row in range(rows):
                assert_same_bits(matrix.unpack(row), halves[row])
    assert found == expected
    assert {expected.count(kind) > 30 for kind in (FLOAT16, TWELVE_BITS, TWELVE_BITS_WITH_BASES)} == {True}


def test_groups_from_bfloat16_are_all_packed() -> None:
    """N(0, 0.02) rounded to bfloat16, as Llama-2's weights, takes 12 bits per weight."""
    halves = (torch.randn(200, 4096) * 0.02).bfloat16().half()
    matrix = pack(halves, TILES)
    assert matrix.share.packed == matrix.share.total == halves.numel()
    groups = TILES.groups(200)
    assert matrix.nbytes == groups * (TILES.group_bytes(TWELVE_BITS, 4096) + 8)
    assert TILES.group_bytes(TWELVE_BITS, 4096) == GROUP * 4096 * 12 // 8 + FLAG_BYTES
    assert all(torch.equal(matrix.unpack(row), halves[row].float()) for row in range(200))


@pytest.mark.parametrize("layout", [TILES, SIXTEEN_BITS])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 127), (15, 200), (16, 319), (18, 300)])
def test_numbers_that_are_not_finite_are_found(layout: TileLayout, bad: float, row: int, column: int) -> None:
    """Also in the last rows, which do not fill a group, and in the part that does not fill a block."""
    halves = torch.zeros(19, 320, dtype=torch.float16)
    halves[row, column] = bad
    assert layout.measure(halves, torch.empty(2, dtype=torch.int64)) is None


def test_groups_are_packed_in_any_order() -> None:
    """Blocks of groups that threads pack in another order return the same numbers, and slices share the memory."""
    halves = (torch.randn(150, 200) * 0.02).bfloat16().half()
    halves[33, 4] = 1 + 2**-10
    matrix = empty(150, 200, TILES)
    for first in (128, 0, 64, 32, 96):
        block = halves[first : first + 32]
        assert matrix[first : first + 32].pack(0, block)
    assert all(torch.equal(matrix.unpack(row), halves[row].float()) for row in range(150))
    assert torch.equal(matrix[32:64].unpack(1), halves[33].float())
    assert torch.equal(matrix.first_values(300), halves.view(-1)[:300])
    assert (matrix.share.packed, matrix.share.total) == (134 * 200, 150 * 200)
    assert matrix[128:].share.packed == 22 * 200


@pytest.mark.parametrize("rows", [slice(8, None), slice(0, 40), slice(16, 17)])
def test_a_slice_inside_a_group_is_rejected(rows: slice) -> None:
    """A group cannot be divided."""
    with pytest.raises(EngineError, match="is not the first of a group of 16 rows"):
        empty(100, 64, TILES)[rows]


def truncated(x: Floats) -> Floats:
    """Round to bfloat16 towards zero."""
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def rounded(x: Floats) -> Floats:
    """Round to bfloat16, ties to even."""
    found: Floats = torch.from_numpy(x).bfloat16().float().numpy()
    return found


def tile_sum(total: Floats, x: Floats, weights: Floats) -> Floats:
    """Add the product of a tile of activations (rows, 32) and one of weights (outputs, 32), as AMX defines it.

    Products of two bfloat16 numbers are exact in float32, so each addition rounds once, as in a fused operation.
    """
    sums = [np.zeros_like(total), np.zeros_like(total)]
    for column in range(DEPTH):
        sums[column % 2] = sums[column % 2] + x[:, column, None] * weights[None, :, column]
    return total + (sums[0] + sums[1])


def emulated(x: Floats, halves: Tensor) -> Floats:
    """Return the product of activations (rows, width) and weights (outputs, width) as the AMX kernels define it."""
    padding = ((0, 0), (0, -x.shape[1] % BLOCK))
    x, weights = np.pad(x, padding), np.pad(halves.float().numpy(), padding)
    x_high = rounded(x)
    x_low = rounded(x - x_high)
    high = truncated(weights)
    low = weights - high
    total = np.zeros((len(x), len(weights)), dtype=np.float32)
    for start in range(0, x.shape[1], DEPTH):
        tile = np.s_[:, start : start + DEPTH]
        for one, other in ((x_high, low), (x_low, high), (x_high, high)):
            total = tile_sum(total, one[tile], other[tile])
    return total


def some_weights(outputs: int, width: int, seed: int = 0) -> Tensor:
    """Return weights of which some groups fit in 12 bits, some need bases, and some stay at 16 bits."""
    exact = torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed)) * 0.05
    halves = exact.bfloat16().half()
    halves[20:40:7] = exact[20:40:7].half()
    halves[5::48, 3] = 1.25
    halves[9::32, 10] = 0
    halves[12::32, 21] = 3 * 2**-24  # a subnormal float16 number
    return halves


def some_inputs(rows: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 33, 64, 100, 150])
@pytest.mark.parametrize(("outputs", "width"), [(16, 32), (40, 160), (75, 129), (96, 256), (31, 1000), (40, 2100)])
def test_products_equal_the_emulation_bit_for_bit(rows: int, outputs: int, width: int) -> None:
    """With 12 and with 16 bits per weight, for any number of rows, and sizes that fill neither groups nor blocks."""
    halves, x = some_weights(outputs, width), some_inputs(rows, width)
    expected = torch.from_numpy(emulated(x.numpy(), halves)).view(torch.int32)
    for layout in (TILES, SIXTEEN_BITS):
        assert torch.equal(pack(halves, layout).multiply(x).view(torch.int32), expected)


def test_the_product_of_a_row_has_the_same_bits_among_any_others() -> None:
    """Each number of rows from 1 to 70 is a part of the product of all rows."""
    matrix, x = pack(some_weights(96, 300), TILES), some_inputs(70, 300)
    expected = matrix.multiply(x)
    for rows in range(1, 70):
        first = 70 - rows
        assert torch.equal(matrix.multiply(x[first:]), expected[first:])


@pytest.mark.parametrize(("bits", "limit"), [(16, 2e-5), (12, 5e-6)])
def test_products_are_close_to_float64(bits: int, limit: float) -> None:
    """The relative error is one of the activations' two parts, and at 16 bits also of a product that is left out."""
    exact = torch.randn(64, 4096) * 0.02
    halves = exact.half() if bits == 16 else exact.bfloat16().half()
    x = torch.randn(20, 4096)
    matrix = pack(halves, TILES)
    assert (matrix.share.packed == matrix.share.total) == (bits == 12)
    expected = x.double() @ halves.double().T
    error = (matrix.multiply(x) - expected).norm() / expected.norm()
    assert error < limit
