"""A decode step in plain torch, compiled with CUDA graphs and a static KV cache, as in gpt-fast (PyTorch, 2023)."""

import statistics
import time
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu

from benchmarks.gpu.measurement.ceilings import synchronize
from benchmarks.gpu.measurement.engine_only import ROUNDS
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.model.weights import LayerWeights, LlamaConfig


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype) * weight


class _Layer(nn.Module):
    """A decoder layer that shares the memory of the model's weights; its buffers are the KV cache."""

    attention_norm: Tensor
    qkv: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    keys: Tensor
    values: Tensor

    def __init__(self, config: LlamaConfig, weights: LayerWeights[Tensor], context_length: int) -> None:
        super().__init__()
        self._config = config
        gate, up = weights.gate_up.chunk(2)
        for name, weight in (
            ("attention_norm", weights.attention_norm), ("qkv", weights.qkv), ("output", weights.output),
            ("mlp_norm", weights.mlp_norm), ("gate", gate), ("up", up), ("down", weights.down),
        ):  # fmt: skip
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        shape = (1, config.kv_heads, context_length, config.head_dim)
        self.register_buffer("keys", weights.qkv.new_zeros(shape))
        self.register_buffer("values", weights.qkv.new_zeros(shape))

    def forward(self, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """Append tokens at `positions` (tokens,), and return x (1, tokens, hidden_size) after this layer."""
        epsilon = self._config.rms_norm_eps
        x = x + linear(self._attend(_norm(x, self.attention_norm, epsilon), positions, rotary, mask), self.output)
        inner = _norm(x, self.mlp_norm, epsilon)
        return x + linear(silu(linear(inner, self.gate)) * linear(inner, self.up), self.down)

    def _attend(self, x: Tensor, positions: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        config = self._config
        sizes = [config.query_size, config.kv_size, config.kv_size]
        heads = [
            part.view(1, x.shape[1], -1, config.head_dim) for part in torch.split(linear(x, self.qkv), sizes, dim=-1)
        ]
        query, key, value = [part.transpose(1, 2) for part in heads]  # (1, heads, tokens, head_dim)
        self.keys[:, :, positions] = _rotated(key, rotary)
        self.values[:, :, positions] = value
        groups = config.heads // config.kv_heads
        keys, values = [cache.repeat_interleave(groups, dim=1) for cache in (self.keys, self.values)]
        attended = scaled_dot_product_attention(_rotated(query, rotary), keys, values, attn_mask=mask)
        return attended.transpose(1, 2).reshape(1, x.shape[1], -1)


def _rotated(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:  # (1, heads, tokens, head_dim)
    cosines, sines = rotary  # (tokens, head_dim), sines negative in the first half
    return heads * cosines + heads.roll(heads.shape[-1] // 2, dims=-1) * sines


class _Transformer(nn.Module):
    embedding: Tensor
    norm: Tensor
    head: Tensor
    cosines: Tensor
    sines: Tensor
    mask: Tensor

    def __init__(self, model: LlamaModel, context_length: int) -> None:
        super().__init__()
        config, weights = model.config, model.weights
        self._epsilon = config.rms_norm_eps
        self.layers = nn.ModuleList(_Layer(config, layer, context_length) for layer in weights.layers)
        for name, weight in (("embedding", weights.embedding), ("norm", weights.norm), ("head", weights.head)):
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        cosines, sines = (table[:context_length] for table in model.rotary)
        size = (context_length, context_length)
        mask = torch.ones(size, dtype=torch.bool, device=model.device).tril()
        for name, table in (("cosines", cosines), ("sines", sines), ("mask", mask)):
            self.register_buffer(name, table.clone())

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:  # (1, tokens), (tokens,)
        """Append the tokens and return the logits after each, (1, tokens, vocab_size)."""
        rotary, mask = (self.cosines[positions], self.sines[positions]), self.mask[None, None, positions]
        x = embedding(token_ids, self.embedding)
        for layer in self.layers:
            x = layer(x, positions, rotary, mask)
        return linear(_norm(x, self.norm, self._epsilon), self.head)


class CompiledStep:
    """Greedy decoding of one sequence by a compiled step; on a CPU, the step is only traced.

    Args:
        model: the model whose weights are used.
        context_length: number of tokens of the KV cache, all of which each step reads.
    """

    def __init__(self, model: LlamaModel, context_length: int) -> None:
        self._device = str(model.device)
        self._vocab_size = model.vocab_size
        with torch.no_grad():
            self.transformer = _Transformer(model, context_length)
        options: dict[str, Any] = {"mode": "reduce-overhead"} if self._device == "cuda" else {"backend": "eager"}
        self._step = torch.compile(self._next_token, fullgraph=True, **options)

    def _next_token(self, token_ids: Tensor, positions: Tensor) -> Tensor:  # (1, tokens), (tokens,) -> (1, 1)
        logits: Tensor = self.transformer(token_ids, positions)
        return logits[:, -1].argmax(dim=-1, keepdim=True)

    @torch.no_grad()
    def tokens_per_second(self, prompt_tokens: int, new_tokens: int) -> float:
        """Measure greedy decoding after the first token."""
        prompt = torch.randint(3, self._vocab_size, (prompt_tokens,), device=self._device)
        seconds = [self._generate(prompt, new_tokens)[1] for _ in range(ROUNDS + 2)][2:]
        return (new_tokens - 1) / statistics.median(seconds)

    @torch.no_grad()
    def generate(self, prompt_ids: list[int], new_tokens: int) -> list[int]:
        """Return the most likely tokens after a prompt."""
        return self._generate(torch.tensor(prompt_ids, device=self._device), new_tokens)[0]

    def _generate(self, prompt: Tensor, new_tokens: int) -> tuple[list[int], float]:
        """Return the tokens, and the seconds of the tokens after the first."""
        token = self._next_token(prompt[None], torch.arange(len(prompt), device=self._device))
        position = torch.tensor([len(prompt)], device=self._device)
        tokens = [token]
        synchronize(self._device)
        started_at = time.perf_counter()
        # In plain operations, whose code inductor generates; it also tunes its kernels, as gpt-fast asks it to.
        with sdpa_kernel(SDPBackend.MATH), torch._inductor.config.patch(coordinate_descent_tuning=True):
            for _ in range(new_tokens - 1):
                token = self._step(token, position).clone()  # the next step overwrites its result
                position += 1
                tokens.append(token)
        synchronize(self._device)
        return torch.cat(tokens).flatten().tolist(), time.perf_counter() - started_at
