"""Float16 numbers and the formats of their rows, found without the packing code, and matrices that it packs."""

import math
import random

import torch
from torch import Tensor

from llama2_server.engine.model.packed_weights import PackedMatrix, PackedMemory
from llama2_server.engine.model.weight_layout import FLOAT16, TWELVE_BITS, TWELVE_BITS_WITH_BASES, WeightLayout

BLOCK = 128
MAX_BASE = 18  # then the codes reach beyond the largest float16


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


def assert_same_bits(found: Tensor, halves: Tensor) -> None:
    assert torch.equal(found.view(torch.int32), halves.float().view(torch.int32))


def empty(rows: int, width: int, layout: WeightLayout) -> PackedMatrix:
    """Return a matrix whose rows are not packed yet."""
    memory = PackedMemory(layout.groups(rows) * layout.group_bytes(FLOAT16, width))
    return PackedMatrix.allocate(memory, rows, width, layout)


def pack(halves: Tensor, layout: WeightLayout) -> PackedMatrix:
    """Return a packed matrix."""
    rows, width = halves.shape
    matrix = empty(rows, width, layout)
    assert matrix.pack(0, halves)
    return matrix


def formats(halves: Tensor, layout: WeightLayout) -> list[int]:
    """Return the format of each group."""
    found = torch.empty(layout.groups(len(halves)), dtype=torch.int64)
    assert layout.measure(halves, found) is not None
    listed: list[int] = found.tolist()
    return listed
