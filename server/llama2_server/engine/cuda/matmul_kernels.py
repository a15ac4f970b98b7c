"""Triton kernels for the product of one row and a weight, with what comes before and after it.

Each weight is read once; sums are in float32, whatever the dtype of the tensors.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How much of a weight one program takes at a time, and with how many warps."""

    columns: int
    width: int
    warps: int


@triton.jit
def _product_kernel(
    x,  # (width,)
    norm,  # (width,)
    weight,  # (columns, width)
    before,  # (columns,)
    out,  # (columns,)
    columns,
    width,
    epsilon,
    NORMED: tl.constexpr,
    ADDED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """`[before +] weight @ [rms_norm](x)`: the norm's factor is one for all, so it can wait until the end."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exists = column < columns
    places = weight + column[:, None].to(tl.int64) * width
    sums = tl.zeros((BLOCK_COLUMNS, BLOCK_WIDTH), tl.float32)
    squares = tl.zeros((BLOCK_WIDTH,), tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        at = start + tl.arange(0, BLOCK_WIDTH)
        inside = (at < width) | EVEN
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            squares += values * values
            values *= tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)
        mask = exists[:, None] & inside[None, :]
        block = tl.load(places + at[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        sums += block.to(tl.float32) * values[None, :]
    total = tl.sum(sums, axis=1)
    if NORMED:
        total *= tl.rsqrt(tl.sum(squares, axis=0) / width + epsilon)
    if ADDED:
        total += tl.load(before + column, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + column, total, mask=exists)


@triton.jit
def _gated_product_kernel(
    x,  # (width,)
    norm,  # (width,)
    weight,  # (2 * columns, width): the gate's rows, then those of up
    out,  # (columns,)
    columns,
    width,
    epsilon,
    EVEN: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """SwiGLU: out = silu(gate @ rms_norm(x)) * (up @ rms_norm(x))."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exists = column < columns
    gate_places = weight + column[:, None].to(tl.int64) * width
    up_places = weight + (columns + column)[:, None].to(tl.int64) * width
    gates = tl.zeros((BLOCK_COLUMNS, BLOCK_WIDTH), tl.float32)
    ups = tl.zeros((BLOCK_COLUMNS, BLOCK_WIDTH), tl.float32)
    squares = tl.zeros((BLOCK_WIDTH,), tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        at = start + tl.arange(0, BLOCK_WIDTH)
        inside = (at < width) | EVEN
        mask = exists[:, None] & inside[None, :]
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        squares += values * values
        values *= tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_places + at[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        up = tl.load(up_places + at[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        gates += gate.to(tl.float32) * values[None, :]
        ups += up.to(tl.float32) * values[None, :]
    factor = tl.rsqrt(tl.sum(squares, axis=0) / width + epsilon)
    gate_sum = tl.sum(gates, axis=1) * factor
    up_sum = tl.sum(ups, axis=1) * factor
    tl.store(out + column, gate_sum * tl.sigmoid(gate_sum) * up_sum, mask=exists)


def product(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    before: Tensor | None = None,
    dtype: torch.dtype | None = None,
    tile: TileConfig,
) -> Tensor:  # x (1, width), weight (columns, width) -> (1, columns)
    """`[before +] linear([rms_norm](x), weight)` for one row."""
    columns, width = weight.shape
    out = x.new_empty((1, columns), dtype=dtype)
    _product_kernel[(triton.cdiv(columns, tile.columns),)](
        x,
        x if norm is None else norm,
        weight,
        x if before is None else before,
        out,
        columns,
        width,
        epsilon,
        NORMED=norm is not None,
        ADDED=before is not None,
        EVEN=width % tile.width == 0,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_WIDTH=tile.width,
        num_warps=tile.warps,
    )
    return out


def gated_product(
    x: Tensor, weight: Tensor, *, norm: Tensor, epsilon: float, tile: TileConfig
) -> Tensor:  # x (1, width), weight (2 * columns, width) -> (1, columns)
    """SwiGLU's first half for one row: `silu(gate) * up` of the normed x."""
    columns, width = weight.shape[0] // 2, weight.shape[1]
    out = x.new_empty((1, columns))
    _gated_product_kernel[(triton.cdiv(columns, tile.columns),)](
        x,
        norm,
        weight,
        out,
        columns,
        width,
        epsilon,
        EVEN=width % tile.width == 0,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_WIDTH=tile.width,
        num_warps=tile.warps,
    )
    return out
