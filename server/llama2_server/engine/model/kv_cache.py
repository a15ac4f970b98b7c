"""The KV cache: keys and values of the tokens so far."""

import torch
from torch import Tensor

from llama2_server.engine.model.weights import LlamaConfig
from llama2_server.engine.native.library import use_huge_pages

Slot = tuple[Tensor, Tensor]  # one layer's keys and values of one slot, each (1, kv_heads, context_length, head_dim)


class KVCache:
    """Keys and values of all slots, allocated once: (slots, kv_heads, context_length, head_dim) per layer.

    The tensors have the device and dtype of `like`.
    """

    def __init__(self, config: LlamaConfig, slots: int, context_length: int, like: Tensor) -> None:
        shape = (slots, config.kv_heads, context_length, config.head_dim)
        memory = like.new_empty((config.layers, 2, *shape))  # in one block, which fills huge pages
        if memory.device.type == "cpu":
            use_huge_pages(memory)
        self.keys = [memory[layer, 0] for layer in range(config.layers)]
        self.values = [memory[layer, 1] for layer in range(config.layers)]
        self.nbytes = self.size_bytes(config, slots, context_length, like.dtype)
        # Views of each slot, made once, because slicing in each layer of each step takes as long as a small kernel.
        self.layers: list[list[Slot]] = [
            [(keys[slot : slot + 1], values[slot : slot + 1]) for slot in range(slots)]
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    @staticmethod
    def size_bytes(config: LlamaConfig, slots: int, context_length: int, dtype: torch.dtype) -> int:
        """Return the size of such a cache in bytes, for a `context_length` in tokens."""
        return 2 * config.layers * slots * context_length * config.kv_size * dtype.itemsize
