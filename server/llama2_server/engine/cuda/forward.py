"""The forward pass of a decode step, from custom kernels, with static shapes and without host synchronization."""

from torch import Tensor

from llama2_server.engine.cuda.attention_kernels import attend, rotate_and_store
from llama2_server.engine.cuda.matmul import Matmul
from llama2_server.engine.model.llama import LlamaModel


class CudaForward:
    """The forward pass for one more token in some slots of a model; equals LlamaModel.decode except for rounding."""

    def __init__(self, model: LlamaModel, matmul: Matmul) -> None:
        self._weights = model.weights
        self._kv_cache = model.kv_cache
        self._rotary = model.rotary
        self._matmul = matmul

    def __call__(self, token_ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:  # (rows,) -> (rows, vocab_size)
        """Append the tokens at `positions` of `slots` and return the float32 logits after each.

        A row with a negative position is padding: it changes no slot, and its logits are undefined.
        """
        matmul, weights, cache = self._matmul, self._weights, self._kv_cache
        x = weights.embedding[token_ids]  # (rows, hidden_size)
        for layer, keys, values in zip(weights.layers, cache.keys, cache.values, strict=True):
            qkv = matmul.rmsnorm_linear(x, layer.attention_norm, layer.qkv)
            queries = rotate_and_store(qkv, self._rotary, slots, positions, keys, values)
            attended = attend(queries, slots, positions, keys, values)  # (rows, query_size)
            x = matmul.linear_residual(x, attended, layer.output)
            inner = matmul.swiglu(x, layer.mlp_norm, layer.gate_up)  # (rows, intermediate_size)
            x = matmul.linear_residual(x, inner, layer.down)
        return matmul.lm_head(x, weights.norm, weights.head)
