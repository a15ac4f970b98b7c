"""The choice between the two families of native kernels: portable, or amx. It never depends on a measurement.

Texts can differ between the families, so the fingerprint contains the family.
"""

import functools
import logging
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.packed_weights import (
    MIN_PACKED_BYTES,
    CpuWeightBits,
    PackedMatrix,
    PackedMemory,
    packs_weights,
)
from llama2_server.engine.model.weight_layout import AMX, FLOAT16, ROWS, TileLayout, WeightLayout
from llama2_server.engine.model.weights import LlamaConfig
from llama2_server.engine.native.library import NativeUnavailable, find_instructions
from llama2_server.engine.native.processor import has_amx

logger = logging.getLogger(__name__)

CpuKernels = Literal["auto", "portable", "amx", "torch"]
# auto: amx if the processor supports it and the model is large enough, otherwise portable, otherwise torch
# The matrices that the self-check multiplies: their largest integer, and the exponent of a factor. They are stored in
# 16 bits, in 12 bits with bases, and in 12 bits.
CHECKED_MATRICES = ((300, 0), (255, 0), (255, -10))
# Two blocks of columns and three groups of rows, the last ones in part.
CHECKED_SHAPE = (40, 160)
CHECKED_ROWS = (1, 17)
MAX_CHECKED_INPUT = 300  # all sums are below 2^24
EIGHT_BITS = 255
REFUSED = "AMX is not available, although the processor has it: the system or the compiler of the library refuses it"


class Reason(NamedTuple):
    """Why the AMX kernels do not run a model."""

    text: str
    level: int = logging.WARNING
    """The level of its log record, if the setting leaves the choice to the server."""


def choose_layout(
    kernels: CpuKernels, bits: CpuWeightBits, config: LlamaConfig, float16_bytes: int, slots: int
) -> WeightLayout | None:
    """Return the layout of a float16 model's packed weights on a CPU, or None if they stay float16 tensors.

    Log why the AMX kernels do not run the model, if the settings or the processor suggest that they do.

    Args:
        kernels: the setting.
        bits: bits per weight, a setting.
        config: shapes of the model.
        float16_bytes: size of the weights in float16.
        slots: maximum number of concurrent sequences.
    """
    if kernels == "torch":
        return None
    if runs_amx(kernels, config, float16_bytes):
        return TileLayout(twelve_bits=bits != "16")
    return ROWS if packs_weights(bits, float16_bytes, slots) else None


def runs_amx(kernels: CpuKernels, config: LlamaConfig, float16_bytes: int) -> bool:
    """Return whether the AMX kernels run a model with this setting; log a reason against it as in `choose_layout`."""
    # With auto, models in the processor's cache keep one text on every processor.
    if kernels in ("portable", "torch") or (kernels == "auto" and float16_bytes < MIN_PACKED_BYTES):
        return False
    try:
        find_instructions()
    except NativeUnavailable:
        return False  # the model logs why it runs in torch
    reason = _reason_against_amx(config)
    if reason is None:
        return True
    if kernels == "amx":
        logger.warning("--cpu-kernels is amx, but %s; running with the portable kernels", reason.text)
    elif has_amx():
        logger.log(reason.level, "%s; running with the portable kernels", reason.text)
    return False


def _reason_against_amx(config: LlamaConfig) -> Reason | None:
    try:
        find_instructions(AMX)
    except NativeUnavailable as error:
        return Reason(REFUSED if has_amx() else str(error))
    sizes = {
        "queries": config.query_size,
        "keys": config.kv_size,
        "intermediate size": config.intermediate_size,
    }
    unsuitable = [f"{name} {size}" for name, size in sizes.items() if size % TileLayout.group_rows != 0]
    if unsuitable:
        sizes_text = ", ".join(unsuitable)
        return Reason(f"AMX needs sizes that are multiples of {TileLayout.group_rows} ({sizes_text})", logging.INFO)
    return None if amx_is_exact() else Reason("AMX fails its self-check: a product differs from the exact result")


@functools.cache
def amx_is_exact() -> bool:
    """Return whether small products of integers with AMX, which are exact in each step, equal the exact results."""
    try:
        return all(_multiplies_exactly(*matrix) for matrix in CHECKED_MATRICES)
    except EngineError:
        return False


def _multiplies_exactly(largest: int, exponent: int) -> bool:
    layout, (outputs, width) = TileLayout(), CHECKED_SHAPE
    integers = _integers(outputs * width, largest).view(CHECKED_SHAPE)
    # The kernels leave out the product of both lower parts, so in each column, weights or activations have 8 bits.
    integers[:, ::2].clamp_(-EIGHT_BITS, EIGHT_BITS)
    memory = PackedMemory(layout.groups(outputs) * layout.group_bytes(FLOAT16, width))
    matrix = PackedMatrix.allocate(memory, outputs, width, layout)
    if not matrix.pack(0, (integers * 2.0**exponent).half()):
        return False
    for rows in CHECKED_ROWS:
        x = _integers(rows * width, MAX_CHECKED_INPUT).view(rows, width)
        x[:, 1::2].clamp_(-EIGHT_BITS, EIGHT_BITS)
        if not torch.equal(matrix.multiply(x.float()).double(), x @ integers.T * 2.0**exponent):
            return False
    return True


def _integers(count: int, largest: int) -> Tensor:  # (count,) float64
    """Return integers of both signs up to `largest`, in an order without a short period."""
    return (torch.arange(count, dtype=torch.int64) ** 2 * 7919 % (2 * largest + 1) - largest).double()
