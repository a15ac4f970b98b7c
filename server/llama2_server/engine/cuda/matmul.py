"""The products of activations and weights in a decode step, each computed in the way that is fastest on this device.

Several rows go through torch, whose libraries use the matrix units. For a single row, which only has to read the weight
as fast as the memory gives it, our kernel in some shape may be faster: which one is measured when the server starts.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from llama2_server.engine.cuda.matmul_kernels import TileConfig, gated_product, product

MatmulVariant = TileConfig | None
"""How a product of one row is computed; None is torch's."""

# What a warp reads in one go: 16 bytes of float16 for each of its threads. In a tile as wide as that for all its warps,
# each thread reads the activations that belong to its weights, so none waits for another before the sums.
WARP_WIDTH = 256
VARIANTS: tuple[MatmulVariant, ...] = (
    None,
    *(
        TileConfig(columns, WARP_WIDTH * warps, warps)
        for columns, warps in ((4, 1), (2, 2), (4, 2), (1, 4), (2, 4), (4, 4))
    ),
)


class Matmul:
    """The products of a step. `ways` says how those of one row are computed, by their name; torch's where unsaid."""

    def __init__(self, epsilon: float, ways: dict[str, MatmulVariant] | None = None) -> None:
        self._epsilon = epsilon
        self.ways = dict(ways or {})

    def normed(self, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:  # (rows, in), (out, in) -> (rows, out)
        """`linear(rms_norm(x), weight)`."""
        tile = self._tile("normed", x, weight)
        if tile:
            return product(x, weight, norm=norm, epsilon=self._epsilon, tile=tile)
        return linear(self._norm(x, norm), weight)

    def logits(self, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:  # (rows, in), (out, in) -> (rows, out)
        """`normed`, in float32."""
        tile = self._tile("logits", x, weight)
        if tile:
            return product(x, weight, norm=norm, epsilon=self._epsilon, dtype=torch.float32, tile=tile)
        return linear(self._norm(x, norm), weight).float()

    def added(self, before: Tensor, x: Tensor, weight: Tensor) -> Tensor:  # (rows, out), (rows, in), (out, in)
        """`before + linear(x, weight)`."""
        tile = self._tile("added", x, weight)
        if tile:
            return product(x, weight, before=before, tile=tile)
        return torch.addmm(before, x, weight.t())

    def gated(self, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:  # (rows, in), (2 * out, in) -> (rows, out)
        """SwiGLU's first half of the normed x: `silu(gate) * up`."""
        tile = self._tile("gated", x, weight)
        if tile:
            return gated_product(x, weight, norm=norm, epsilon=self._epsilon, tile=tile)
        gate, up = linear(self._norm(x, norm), weight).chunk(2, dim=-1)
        return silu(gate) * up

    def _norm(self, x: Tensor, norm: Tensor) -> Tensor:
        return rms_norm(x, norm.shape, norm, self._epsilon)

    def _tile(self, kind: str, x: Tensor, weight: Tensor) -> MatmulVariant:
        return self.ways.get(name_of(kind, weight)) if x.shape[0] == 1 else None


def name_of(kind: str, weight: Tensor) -> str:
    """What a product is called among the ways: its kind and the shape of its weight."""
    return f"{kind} {weight.shape[0]}x{weight.shape[1]}"
