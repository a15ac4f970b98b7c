"""The shape of a Llama model, and its weights in memory."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from llama2_server.engine.native.library import use_huge_pages

M = TypeVar("M")  # the type of a matrix: Tensor, or PackedMatrix for the native kernels
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
class LayerWeights(Generic[M]):
    """The weights of one decoder layer; projections of the same input are fused into one matrix."""

    attention_norm: Tensor  # (hidden_size,)
    qkv: M  # (query_size + 2 * kv_size, hidden_size)
    output: M  # (hidden_size, query_size)
    mlp_norm: Tensor  # (hidden_size,)
    gate_up: M  # (2 * intermediate_size, hidden_size)
    down: M  # (hidden_size, intermediate_size)


@dataclass(frozen=True, slots=True)
class LlamaWeights(Generic[M]):
    """All weights of a model; with tied embeddings, `head` is the same matrix as `embedding`."""

    embedding: M  # (vocab_size, hidden_size)
    layers: tuple[LayerWeights[M], ...]
    norm: Tensor  # (hidden_size,)
    head: M  # (vocab_size, hidden_size)

    @staticmethod
    def allocate(config: LlamaConfig, device: torch.device | str, dtype: torch.dtype) -> "LlamaWeights[Tensor]":
        """Return uninitialized weights in one block of memory; on device "meta" they take no memory.

        A single block fills huge pages, which many small blocks would not.
        """
        shapes: list[tuple[int, ...]] = []

        def record(*shape: int) -> Tensor:
            shapes.append(shape)
            return torch.empty(shape, device="meta", dtype=dtype)

        LlamaWeights.arrange(config, record, record)
        # Rounded up to whole cache lines, so that each tensor is aligned to one.
        sizes = [-(-math.prod(shape) // CACHE_LINE_ELEMENTS) * CACHE_LINE_ELEMENTS for shape in shapes]
        memory = torch.empty(sum(sizes), device=device, dtype=dtype)
        if memory.device.type == "cpu":
            use_huge_pages(memory)
        pieces = iter(torch.split(memory, sizes))

        def take(*shape: int) -> Tensor:
            return next(pieces)[: math.prod(shape)].view(shape)

        return LlamaWeights.arrange(config, take, take)

    @staticmethod
    def arrange(
        config: LlamaConfig, matrix: Callable[[int, int], M], norm: Callable[[int], Tensor]
    ) -> "LlamaWeights[M]":
        """Return the weights that `matrix` (outputs, inputs) and `norm` (width) make, in the order of a step."""
        hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
        embedding = matrix(vocab, hidden)
        layers = tuple(
            LayerWeights(
                attention_norm=norm(hidden),
                qkv=matrix(config.query_size + 2 * config.kv_size, hidden),
                output=matrix(hidden, config.query_size),
                mlp_norm=norm(hidden),
                gate_up=matrix(2 * inner, hidden),
                down=matrix(hidden, inner),
            )
            for _ in range(config.layers)
        )
        head = embedding if config.tied_embeddings else matrix(vocab, hidden)
        return LlamaWeights(embedding, layers, norm(hidden), head)

    @property
    def matrices(self) -> list[M]:
        """All matrices; tied weights count once."""
        tables = [self.embedding] if self.head is self.embedding else [self.embedding, self.head]
        return [*tables, *(matrix for layer in self.layers for matrix in layer_matrices(layer))]

    def quick_digest(self) -> str:
        """Return a quick hash that distinguishes weights: SHA-256 of the dtype and of the first values of each tensor.

        It does not depend on the bits per weight in memory.
        """
        parts = [getattr(layer, part.name) for layer in self.layers for part in fields(layer)]
        heads = [first_values(part) for part in (self.embedding, self.head, self.norm, *parts)]
        found = torch.cat(heads).double().cpu()
        return hashlib.sha256(f"{self.norm.dtype} {found.tolist()}".encode()).hexdigest()

    @property
    def parameters(self) -> int:
        """Number of weights; tied weights count once."""
        return sum(math.prod(part.shape) for part in self._parts())

    @property
    def size_bytes(self) -> int:
        """Size of all weights in bytes; tied weights count once."""
        return sum(part.nbytes for part in self._parts())

    def _parts(self) -> list[Any]:
        norms = [norm for layer in self.layers for norm in (layer.attention_norm, layer.mlp_norm)]
        return [*self.matrices, *norms, self.norm]


def layer_matrices(layer: LayerWeights[M]) -> tuple[M, ...]:
    """Return the matrices of a layer in the order of a step."""
    return layer.qkv, layer.output, layer.gate_up, layer.down


def first_values(part: Any) -> Tensor:  # (CACHE_LINE_ELEMENTS,) or fewer
    """Return the first numbers of a tensor or a packed matrix."""
    if isinstance(part, Tensor):
        return part.view(-1)[:CACHE_LINE_ELEMENTS]
    return Tensor(part.first_values(CACHE_LINE_ELEMENTS))
