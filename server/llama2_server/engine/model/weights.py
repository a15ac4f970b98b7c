"""The shape of a Llama model, and its weights in memory."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from llama2_server.engine.native.library import use_huge_pages

CACHE_LINE_ELEMENTS = 32  # 16-bit numbers in a 64-byte cache line


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The shape of a model; the field names are shortened names of transformers' LlamaConfig."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    tied_embeddings: bool

    @property
    def query_size(self) -> int:
        """Number of query elements per token, over all heads."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Number of key elements per token, over all key heads; values have the same number."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of one decoder layer; projections of the same input are fused into one matrix."""

    attention_norm: Tensor  # (hidden_size,)
    qkv: Tensor  # (query_size + 2 * kv_size, hidden_size)
    output: Tensor  # (hidden_size, query_size)
    mlp_norm: Tensor  # (hidden_size,)
    gate_up: Tensor  # (2 * intermediate_size, hidden_size)
    down: Tensor  # (hidden_size, intermediate_size)


@dataclass(frozen=True, slots=True)
class LlamaWeights:
    """All weights of a model; with tied embeddings, `head` is the same tensor as `embedding`."""

    embedding: Tensor  # (vocab_size, hidden_size)
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # (hidden_size,)
    head: Tensor  # (vocab_size, hidden_size)

    @classmethod
    def allocate(cls, config: LlamaConfig, device: torch.device | str, dtype: torch.dtype) -> "LlamaWeights":
        """Return uninitialized weights in one block of memory; on device "meta" they take no memory.

        A single block fills huge pages, which many small blocks would not.
        """
        shapes: list[tuple[int, ...]] = []

        def record(*shape: int) -> Tensor:
            shapes.append(shape)
            return torch.empty(shape, device="meta", dtype=dtype)

        cls._arrange(config, record)
        # Rounded up to whole cache lines, so that each tensor is aligned to one.
        sizes = [-(-math.prod(shape) // CACHE_LINE_ELEMENTS) * CACHE_LINE_ELEMENTS for shape in shapes]
        memory = torch.empty(sum(sizes), device=device, dtype=dtype)
        if memory.device.type == "cpu":
            use_huge_pages(memory)
        pieces = iter(torch.split(memory, sizes))
        return cls._arrange(config, lambda *shape: next(pieces)[: math.prod(shape)].view(shape))

    @classmethod
    def _arrange(cls, config: LlamaConfig, empty: Callable[..., Tensor]) -> "LlamaWeights":
        hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
        embedding = empty(vocab, hidden)
        layers = tuple(
            LayerWeights(
                attention_norm=empty(hidden),
                qkv=empty(config.query_size + 2 * config.kv_size, hidden),
                output=empty(hidden, config.query_size),
                mlp_norm=empty(hidden),
                gate_up=empty(2 * inner, hidden),
                down=empty(hidden, inner),
            )
            for _ in range(config.layers)
        )
        head = embedding if config.tied_embeddings else empty(vocab, hidden)
        return cls(embedding, layers, empty(hidden), head)

    def fingerprint(self) -> str:
        """Return a hash that identifies the weights: SHA-256 of the dtype and of the first values of each tensor."""
        parts = [getattr(layer, part.name) for layer in self.layers for part in fields(layer)]
        heads = [tensor.view(-1)[:CACHE_LINE_ELEMENTS] for tensor in (self.embedding, self.head, self.norm, *parts)]
        found = torch.cat(heads).double().cpu()
        return hashlib.sha256(f"{self.embedding.dtype} {found.tolist()}".encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Size of all weights in bytes; tied weights count once."""
        tables = [self.embedding] if self.head is self.embedding else [self.embedding, self.head]
        parts = [getattr(layer, part.name) for layer in self.layers for part in fields(layer)]
        return sum(tensor.nbytes for tensor in (*tables, *parts, self.norm))
