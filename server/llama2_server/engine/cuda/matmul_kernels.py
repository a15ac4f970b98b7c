"""Triton GEMV kernels: one row of activations times a weight, fused with the operations before and after it.

Each weight is read once. Sums are in float32 for any dtype of the tensors.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TileConfig:
    """The tile of a weight that one program reads per iteration, and its number of warps."""

    block_n: int
    block_k: int
    num_warps: int


# ptxas would spill 8 bytes on some cards, to stay at 64 registers of each thread for these tiles.
MATMUL_REGISTERS, SWIGLU_REGISTERS = {4: 80}, {2: 80}
"""The maximum number of registers by the rows of a tile; otherwise the compiler chooses."""


@triton.jit
def _matmul_kernel(
    x,  # (K,)
    norm,  # (K,)
    weight,  # (N, K)
    residual,  # (N,)
    out,  # (N,)
    N,
    K,
    epsilon,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute `[residual +] weight @ [rms_norm](x)`; the norm's factor is a scalar, so it is applied at the end."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    rows = weight + n[:, None].to(tl.int64) * K
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = (k < K) | EVEN_K
        values = tl.load(x + k, mask=k_mask, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += values * values
            values *= tl.load(norm + k, mask=k_mask, other=0.0).to(tl.float32)
        mask = n_mask[:, None] & k_mask[None, :]
        tile = tl.load(rows + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        sums += tile.to(tl.float32) * values[None, :]
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
    K,
    epsilon,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute `silu(gate @ rms_norm(x)) * (up @ rms_norm(x))`."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    gate_rows = weight + n[:, None].to(tl.int64) * K
    up_rows = weight + (N + n)[:, None].to(tl.int64) * K
    gate_sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = (k < K) | EVEN_K
        mask = n_mask[:, None] & k_mask[None, :]
        values = tl.load(x + k, mask=k_mask, other=0.0).to(tl.float32)
        squares += values * values
        values *= tl.load(norm + k, mask=k_mask, other=0.0).to(tl.float32)
        gate_tile = tl.load(gate_rows + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        up_tile = tl.load(up_rows + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        gate_sums += gate_tile.to(tl.float32) * values[None, :]
        up_sums += up_tile.to(tl.float32) * values[None, :]
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
) -> Tensor:  # x (1, k), weight (n, k) -> (1, n)
    """Return `[residual +] linear([rms_norm](x), weight)` of one row."""
    n, k = weight.shape
    out = x.new_empty((1, n), dtype=dtype)
    _matmul_kernel[(triton.cdiv(n, config.block_n),)](
        x,
        x if norm is None else norm,
        weight,
        x if residual is None else residual,
        out,
        n,
        k,
        epsilon,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        EVEN_K=k % config.block_k == 0,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        maxnreg=MATMUL_REGISTERS.get(config.block_n),
    )
    return out


def swiglu(
    x: Tensor, weight: Tensor, *, norm: Tensor, epsilon: float, config: TileConfig
) -> Tensor:  # x (1, k), weight (2 * n, k) -> (1, n)
    """Return `silu(gate) * up` of one normalized row, the first half of SwiGLU."""
    n, k = weight.shape[0] // 2, weight.shape[1]
    out = x.new_empty((1, n))
    _swiglu_kernel[(triton.cdiv(n, config.block_n),)](
        x,
        norm,
        weight,
        out,
        n,
        k,
        epsilon,
        EVEN_K=k % config.block_k == 0,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        maxnreg=SWIGLU_REGISTERS.get(config.block_n),
    )
    return out
