"""The network that is trained: Llama's architecture in the form that trains fastest on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.demo_model.tokenizer import IGNORED, VOCAB_SIZE

CONTEXT_LENGTH = 1024
ROPE_THETA = 10000.0
NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class Size:
    """The dimensions of the network."""

    hidden: int = 256
    inner: int = 640
    layers: int = 5
    heads: int = 4
    vocab: int = VOCAB_SIZE


class Layer(nn.Module):
    """One decoder layer; the parameters have the names of transformers' LlamaDecoderLayer."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        hidden, self.heads = size.hidden, size.heads

        def matrix(outputs: int, inputs: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(outputs, inputs).normal_(0.0, 0.02))

        self.query, self.key, self.value, self.output = (matrix(hidden, hidden) for _ in range(4))
        self.gate, self.up, self.down = (
            matrix(size.inner, hidden),
            matrix(size.inner, hidden),
            matrix(hidden, size.inner),
        )
        self.attention_norm = nn.RMSNorm(hidden, NORM_EPSILON)
        self.mlp_norm = nn.RMSNorm(hidden, NORM_EPSILON)

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Return the states, (rows, length, hidden), after this layer."""
        states = states + self._attend(self.attention_norm(states), cos, sin, mask)
        gate, up = functional.linear(self.mlp_norm(states), torch.cat((self.gate, self.up))).chunk(2, -1)
        return states + functional.linear(functional.silu(gate) * up, self.down)

    def _attend(self, states: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Return causal attention, written out: twice as fast on a CPU as the fused function of torch."""
        rows, length, hidden = states.shape
        projected = functional.linear(states, torch.cat((self.query, self.key, self.value)))
        heads = projected.view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key = (_rotate(part, cos, sin).flatten(0, 1) for part in (heads[0], heads[1]))
        value = heads[2].reshape(rows * self.heads, length, -1)
        scores = torch.baddbmm(mask.expand(len(query), length, length), query * query.shape[-1] ** -0.5, key.mT)
        mixed = torch.bmm(scores.softmax(-1), value).view(rows, self.heads, length, -1)
        return functional.linear(mixed.transpose(1, 2).reshape(rows, length, hidden), self.output)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings to (rows, heads, length, head dimension)."""
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat((-second, first), -1) * sin


class Network(nn.Module):
    """A Llama language model with a tied embedding."""

    cos: Tensor
    sin: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Parameter(torch.empty(size.vocab, size.hidden).normal_(0.0, 0.02))
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden, NORM_EPSILON)
        width = size.hidden // size.heads
        frequencies = ROPE_THETA ** -(torch.arange(0, width, 2) / width)
        angles = torch.outer(torch.arange(CONTEXT_LENGTH), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def hidden_states(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the last hidden states, (rows, length, hidden), of token ids, (rows, length)."""
        length = ids.shape[1]
        cos, sin = (table[:length].to(dtype) for table in (self.cos, self.sin))
        mask = torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
        states = functional.embedding(ids, self.embedding)
        for layer in self.layers:
            states = layer(states, cos, sin, mask)
        normed: Tensor = self.norm(states)
        return normed

    def loss(self, ids: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy of the labels, weighted by `weights` if given, computed in bfloat16.

        All three have the shape (rows, length).
        """
        targets = labels[:, 1:].reshape(-1)
        labeled = targets != IGNORED
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.hidden_states(ids[:, :-1], torch.bfloat16).flatten(0, 1)[labeled]
            logits = functional.linear(hidden, self.embedding)
        if weights is None:
            return functional.cross_entropy(logits.float(), targets[labeled])
        shares = weights[:, 1:].reshape(-1)[labeled]
        losses = functional.cross_entropy(logits.float(), targets[labeled], reduction="none")
        return (losses * shares).sum() / shares.sum()

    def checkpoint(self) -> dict[str, Tensor]:
        """Return the weights under transformers' names, rounded to bfloat16 and stored as float16.

        Llama-2's float16 weights also come from bfloat16, so the server runs both in 12 bits per weight.
        """
        return {name: weight.detach().bfloat16().half() for name, weight in self._named_weights().items()}

    def load_checkpoint(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a checkpoint that checkpoint() returned."""
        with torch.no_grad():
            for name, weight in self._named_weights().items():
                weight.copy_(weights[name])

    def _named_weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {
            "model.embed_tokens.weight": self.embedding,
            "model.norm.weight": self.norm.weight,
        }
        for index, layer in enumerate(self.layers):
            for ours, theirs in _NAMES.items():
                weights[f"model.layers.{index}.{theirs}.weight"] = layer.get_parameter(ours)
        return weights


_NAMES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm.weight": "input_layernorm",
    "mlp_norm.weight": "post_attention_layernorm",
}
