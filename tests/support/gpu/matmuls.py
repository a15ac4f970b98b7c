"""The matmuls of a step of Llama-2-7B, for the tests that compile them."""

from collections.abc import Iterator
from typing import NamedTuple

from llama2_server.engine.cuda.matmul import VARIANTS
from llama2_server.engine.cuda.matmul_kernels import TileConfig

TILES = tuple(filter(None, VARIANTS))


class SevenB(NamedTuple):
    """A matmul of one row: its number of summands, and what is fused with it."""

    summands: int
    norm: bool = False
    residual: bool = False
    swiglu: bool = False
    float_out: bool = False

    def constants(self, tile: TileConfig) -> dict[str, bool | int]:
        """Return the constants that the plain and the fused kernel share."""
        found: dict[str, bool | int] = {"BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
        return found if self.swiglu else found | {"HAS_NORM": self.norm, "HAS_RESIDUAL": self.residual}


MATMULS = (
    SevenB(4096, norm=True),
    SevenB(4096, residual=True),
    SevenB(4096, swiglu=True),
    SevenB(11008, residual=True),
    SevenB(4096, norm=True, float_out=True),
)
"""Of queries, keys and values; of the attention's output; the two halves of SwiGLU; of the logits."""


def tiled() -> Iterator[tuple[TileConfig, SevenB]]:
    """Yield each matmul with each tile that autotuning can choose."""
    for tile in TILES:
        for matmul in MATMULS:
            yield tile, matmul
