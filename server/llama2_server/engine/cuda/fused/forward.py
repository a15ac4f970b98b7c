"""The forward pass of a decode step from the fused kernels; the same interface as `cuda/forward.py`."""

from typing import Any

import torch
from torch import Tensor

from llama2_server.engine.cuda.fused.attention_kernels import Attention
from llama2_server.engine.cuda.fused.embedding_kernels import embed
from llama2_server.engine.cuda.fused.launch import launch_options
from llama2_server.engine.cuda.fused.matmul_kernels import matmul, swiglu
from llama2_server.engine.cuda.matmul import Matmul, MatmulVariant, matmul_name
from llama2_server.engine.cuda.matmul_kernels import TileConfig
from llama2_server.engine.cuda.step_runner import COLUMNS, POSITION, SLOT
from llama2_server.engine.model.llama import LlamaModel

# If torch was faster than every tile: each kernel of a step has to overlap with its neighbors.
DEFAULT_TILE = TileConfig(block_n=4, block_k=512, num_warps=2)


class FusedMatmul(Matmul):
    """The matmuls of a fused step: one row in kernels that overlap, several rows in torch."""

    def __init__(self, epsilon: float, variants: dict[str, MatmulVariant], options: dict[str, Any]) -> None:
        super().__init__(epsilon, variants)
        self._options = options

    def rmsnorm_linear(self, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:  # (rows, in), (out, in) -> (rows, out)
        """Return `linear(rms_norm(x), weight)`."""
        if x.shape[0] > 1:
            return super().rmsnorm_linear(x, norm, weight)
        config = self._tile("rmsnorm_linear", weight)
        return matmul(x, weight, norm=norm, epsilon=self._epsilon, config=config, options=self._options)

    def lm_head(self, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:  # (rows, in), (out, in) -> (rows, out)
        """Return `linear(rms_norm(x), weight)` in float32: the logits."""
        if x.shape[0] > 1:
            return super().lm_head(x, norm, weight)
        config, dtype = self._tile("lm_head", weight), torch.float32
        return matmul(x, weight, norm=norm, epsilon=self._epsilon, dtype=dtype, config=config, options=self._options)

    def linear_residual(
        self, residual: Tensor, x: Tensor, weight: Tensor
    ) -> Tensor:  # (rows, out), (rows, in), (out, in)
        """Return `residual + linear(x, weight)`."""
        if x.shape[0] > 1:
            return super().linear_residual(residual, x, weight)
        config = self._tile("linear_residual", weight)
        return matmul(x, weight, residual=residual, config=config, options=self._options)

    def swiglu(self, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:  # (rows, in), (2 * out, in) -> (rows, out)
        """Return `silu(gate) * up` of the normalized x, the first half of SwiGLU."""
        if x.shape[0] > 1:
            return super().swiglu(x, norm, weight)
        config = self._tile("swiglu", weight)
        return swiglu(x, weight, norm=norm, epsilon=self._epsilon, config=config, options=self._options)

    def _tile(self, kind: str, weight: Tensor) -> TileConfig:
        return self.variants.get(matmul_name(kind, weight)) or DEFAULT_TILE


class FusedForward:
    """The forward pass for one more token in some slots of a model; equals LlamaModel.decode except for rounding.

    `variants` are the tiles that autotuning has chosen.
    """

    def __init__(self, model: LlamaModel, variants: dict[str, MatmulVariant]) -> None:
        self._weights = model.weights
        self._kv_cache = model.kv_cache
        self._rotary = model.rotary
        self._heads = model.config.heads
        self.options = launch_options(model.device)
        self._matmul = FusedMatmul(model.config.rms_norm_eps, variants, self.options)
        self._attention: dict[int, Attention] = {}

    def __call__(self, token_ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:  # (rows,) -> (rows, vocab_size)
        """Append the tokens at `positions` of `slots` and return the float32 logits after each.

        A row with a negative position is padding: it changes no slot, and its logits are undefined.
        """
        table = torch.zeros((len(slots), COLUMNS), dtype=torch.float64, device=slots.device)
        table[:, SLOT], table[:, POSITION] = slots, positions
        last_ids = token_ids.new_zeros(len(self._kv_cache.keys[0]) + 1)
        last_ids[slots] = token_ids
        return self.logits(table, last_ids)

    def logits(self, table: Tensor, last_ids: Tensor) -> Tensor:  # (rows, COLUMNS), (slots + 1,) -> (rows, vocab_size)
        """Append each row's last token to its slot and return the float32 logits after it; see `StepKernels`."""
        matmul, weights, cache = self._matmul, self._weights, self._kv_cache
        attention = self._attention_of(table.shape[0])
        x, slots, positions = embed(table, last_ids, weights.embedding, self.options)
        for layer, keys, values in zip(weights.layers, cache.keys, cache.values, strict=True):
            qkv = matmul.rmsnorm_linear(x, layer.attention_norm, layer.qkv)
            attended = attention(qkv, self._rotary, slots, positions, keys, values, layer.output)
            x = matmul.linear_residual(x, attended, layer.output)
            inner = matmul.swiglu(x, layer.mlp_norm, layer.gate_up)  # (rows, intermediate_size)
            x = matmul.linear_residual(x, inner, layer.down)
        return matmul.lm_head(x, weights.norm, weights.head)

    def _attention_of(self, rows: int) -> Attention:
        if rows not in self._attention:
            self._attention[rows] = Attention(rows, self._heads, self._kv_cache.keys[0], self.options)
        return self._attention[rows]
