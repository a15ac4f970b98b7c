"""The matmuls of a decode step, each computed by the variant that is fastest on this device.

Several rows use torch, whose libraries use tensor cores. A matmul of one row (GEMV) is memory-bound, so a Triton kernel
with the right tile can be faster: autotuning selects the variant when the server starts.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from llama2_server.engine.cuda.matmul_kernels import TileConfig, matmul, swiglu

MatmulVariant = TileConfig | None
"""How a matmul of one row is computed: a Triton kernel with this tile, or torch (None)."""

# A warp reads 16 bytes of float16 per thread at once. If a tile is exactly as wide as one such read of all its warps,
# each thread reads the activations that belong to its weights, and no barrier is needed before the final sums.
WARP_BLOCK_K = 256
VARIANTS: tuple[MatmulVariant, ...] = (
    None,
    *(
        TileConfig(block_n, WARP_BLOCK_K * num_warps, num_warps)
        for block_n, num_warps in ((4, 1), (2, 2), (4, 2), (1, 4), (2, 4), (4, 4))
    ),
)


class Matmul:
    """The matmuls of a step.

    `variants` maps matmul names to the variant for one row; a matmul without an entry uses torch.
    """

    def __init__(self, epsilon: float, variants: dict[str, MatmulVariant] | None = None) -> None:
        self._epsilon = epsilon
        self.variants = dict(variants or {})

    def rmsnorm_linear(self, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:  # (rows, in), (out, in) -> (rows, out)
        """Return `linear(rms_norm(x), weight)`."""
        config = self._config("rmsnorm_linear", x, weight)
        if config:
            return matmul(x, weight, norm=norm, epsilon=self._epsilon, config=config)
        return linear(self._norm(x, norm), weight)

    def lm_head(self, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:  # (rows, in), (out, in) -> (rows, out)
        """Return `linear(rms_norm(x), weight)` in float32: the logits."""
        config = self._config("lm_head", x, weight)
        if config:
            return matmul(x, weight, norm=norm, epsilon=self._epsilon, dtype=torch.float32, config=config)
        return linear(self._norm(x, norm), weight).float()

    def linear_residual(
        self, residual: Tensor, x: Tensor, weight: Tensor
    ) -> Tensor:  # (rows, out), (rows, in), (out, in)
        """Return `residual + linear(x, weight)`."""
        config = self._config("linear_residual", x, weight)
        if config:
            return matmul(x, weight, residual=residual, config=config)
        return torch.addmm(residual, x, weight.t())

    def swiglu(self, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:  # (rows, in), (2 * out, in) -> (rows, out)
        """Return `silu(gate) * up` of the normalized x, the first half of SwiGLU."""
        config = self._config("swiglu", x, weight)
        if config:
            return swiglu(x, weight, norm=norm, epsilon=self._epsilon, config=config)
        gate, up = linear(self._norm(x, norm), weight).chunk(2, dim=-1)
        return silu(gate) * up

    def _norm(self, x: Tensor, norm: Tensor) -> Tensor:
        return rms_norm(x, norm.shape, norm, self._epsilon)

    def _config(self, kind: str, x: Tensor, weight: Tensor) -> MatmulVariant:
        return self.variants.get(matmul_name(kind, weight)) if x.shape[0] == 1 else None


def matmul_name(kind: str, weight: Tensor) -> str:
    """Return the key of a matmul in `Matmul.variants`: its kind and the shape of its weight."""
    return f"{kind} {weight.shape[0]}x{weight.shape[1]}"
