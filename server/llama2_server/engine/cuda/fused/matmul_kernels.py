"""Triton GEMV kernels that request their first weights before they wait for the activations.

They sum in the order of `cuda/matmul_kernels.py`, so that both give the same bits with the same tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2_server.engine.cuda.matmul_kernels import TileConfig

MATMUL_REGISTERS, SWIGLU_REGISTERS = {2: 80}, {1: 80}
"""As in `cuda/matmul_kernels.py`."""


@triton.jit
def _load_tile(rows, n_mask, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load the weights of one iteration, (BLOCK_N, BLOCK_K); zeros after the end."""
    k = start + tl.arange(0, BLOCK_K)
    mask = n_mask[:, None] & (k < K)[None, :]
    return tl.load(rows[:, None] + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _matmul_kernel(
    x,  # (K,)
    norm,  # (K,)
    weight,  # (N, K)
    residual,  # (N,)
    out,  # (N,)
    N,
    epsilon,
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute `[residual +] weight @ [rms_norm](x)`; the norm's factor is a scalar, so it is applied at the end."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    rows = weight + n.to(tl.int64) * K
    tile = _load_tile(rows, n_mask, 0, K, BLOCK_K)
    next_tile = _load_tile(rows, n_mask, BLOCK_K, K, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += values * values
            values *= tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
        later_tile = _load_tile(rows, n_mask, start + 2 * BLOCK_K, K, BLOCK_K)
        sums += tile.to(tl.float32) * values[None, :]
        tile = next_tile
        next_tile = later_tile
    total = tl.sum(sums, axis=1)
    if HAS_NORM:
        total *= tl.rsqrt(tl.sum(squares, axis=0) / K + epsilon)
    if HAS_RESIDUAL:
        total += tl.load(residual + n, mask=n_mask, other=0.0).to(tl.float32)
    tl.store(out + n, total, mask=n_mask)


@triton.jit
def _swiglu_kernel(
    x,  # (K,)
    norm,  # (K,)
    weight,  # (2 * N, K): the rows of gate, then the rows of up
    out,  # (N,)
    N,
    epsilon,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute `silu(gate @ rms_norm(x)) * (up @ rms_norm(x))`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    gate_rows = weight + n.to(tl.int64) * K
    up_rows = weight + (N + n).to(tl.int64) * K
    gate_tile = _load_tile(gate_rows, n_mask, 0, K, BLOCK_K)
    up_tile = _load_tile(up_rows, n_mask, 0, K, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_wait()
    gate_sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        squares += values * values
        values *= tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
        next_gate_tile = _load_tile(gate_rows, n_mask, start + BLOCK_K, K, BLOCK_K)
        next_up_tile = _load_tile(up_rows, n_mask, start + BLOCK_K, K, BLOCK_K)
        gate_sums += gate_tile.to(tl.float32) * values[None, :]
        up_sums += up_tile.to(tl.float32) * values[None, :]
        gate_tile = next_gate_tile
        up_tile = next_up_tile
    factor = tl.rsqrt(tl.sum(squares, axis=0) / K + epsilon)
    gate = tl.sum(gate_sums, axis=1) * factor
    up = tl.sum(up_sums, axis=1) * factor
    tl.store(out + n, gate * tl.sigmoid(gate) * up, mask=n_mask)


def matmul(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    config: TileConfig,
    options: dict[str, Any],
) -> Tensor:  # x (1, k), weight (n, k) -> (1, n)
    """Return `[residual +] linear([rms_norm](x), weight)` of one row; `options` come from `launch_options`."""
    n, k = weight.shape
    out = x.new_empty((1, n), dtype=dtype)
    _matmul_kernel[(triton.cdiv(n, config.block_n),)](
        x,
        x if norm is None else norm,
        weight,
        x if residual is None else residual,
        out,
        n,
        epsilon,
        K=k,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        maxnreg=MATMUL_REGISTERS.get(config.block_n),
        **options,
    )
    return out


def swiglu(
    x: Tensor, weight: Tensor, *, norm: Tensor, epsilon: float, config: TileConfig, options: dict[str, Any]
) -> Tensor:  # x (1, k), weight (2 * n, k) -> (1, n)
    """Return `silu(gate) * up` of one normalized row; `options` come from `launch_options`."""
    n, k = weight.shape[0] // 2, weight.shape[1]
    out = x.new_empty((1, n))
    _swiglu_kernel[(triton.cdiv(n, config.block_n),)](
        x,
        norm,
        weight,
        out,
        n,
        epsilon,
        K=k,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        maxnreg=SWIGLU_REGISTERS.get(config.block_n),
        **options,
    )
    return out
