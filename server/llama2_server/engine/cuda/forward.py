"""The decode step's forward pass from our kernels, on static shapes and without a look from the host."""

from torch import Tensor

from llama2_server.engine.cuda.attention_kernels import attend, rotate_and_store
from llama2_server.engine.cuda.matmul import Matmul
from llama2_server.engine.model.llama import LlamaModel


class Forward:
    """One token more in each of some slots of a model; the same as LlamaModel.decode but for rounding."""

    def __init__(self, model: LlamaModel, products: Matmul) -> None:
        self._weights = model.weights
        self._kv_cache = model.kv_cache
        self._rotary = model.rotary
        self._products = products

    def __call__(self, token_ids: Tensor, slots: Tensor, positions: Tensor) -> Tensor:  # (rows,) -> (rows, vocab_size)
        """Append the tokens at `positions` of `slots`; float32 logits after each.

        A row with a position below zero only fills up the step: it changes no slot, and its logits mean nothing.
        """
        products, weights, cache = self._products, self._weights, self._kv_cache
        x = weights.embedding[token_ids]  # (rows, hidden_size)
        for layer, keys, values in zip(weights.layers, cache.keys, cache.values, strict=True):
            qkv = products.normed(x, layer.attention_norm, layer.qkv)
            queries = rotate_and_store(qkv, self._rotary, slots, positions, keys, values)
            attended = attend(queries, slots, positions, keys, values)  # (rows, query_size)
            x = products.added(x, attended, layer.output)
            inner = products.gated(x, layer.mlp_norm, layer.gate_up)  # (rows, intermediate_size)
            x = products.added(x, inner, layer.down)
        return products.logits(x, weights.norm, weights.head)
