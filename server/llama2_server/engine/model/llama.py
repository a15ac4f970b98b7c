"""The Llama forward pass in plain torch, with a KV cache.

Source: Touvron et al. 2023 (Llama 2, arXiv:2307.09288). Names and conventions follow transformers' modeling_llama,
because the checkpoints have its format.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from llama2_server.engine.control_groups import available_cores
from llama2_server.engine.errors import EngineError, OutOfMemory
from llama2_server.engine.model.cpu_kernels import CpuKernels
from llama2_server.engine.model.kv_cache import KVCache, Slot
from llama2_server.engine.model.native_decoder import NativeDecoder
from llama2_server.engine.model.packed_weights import PackedMatrix
from llama2_server.engine.model.prefill_chunks import cuda_chunk_tokens
from llama2_server.engine.model.weights import LayerWeights, LlamaConfig, LlamaWeights
from llama2_server.engine.native.library import NativeUnavailable

logger = logging.getLogger(__name__)

# A smaller model runs on one CPU thread. Two threads would wait for each other longer than one thread needs for the
# step, above all if other programs use the CPU.
SMALL_MODEL_BYTES = 32 * 1024 * 1024
# torch's default, one per physical core or the value of OMP_NUM_THREADS, but not more than this process can use.
CPU_THREADS = min(torch.get_num_threads(), available_cores())
# Matrix products in torch are fast from some hundreds of rows on. The native kernels define their own number, and the
# chunks of a GPU depend on the card (model/prefill_chunks.py). Only whole chunks are reused in torch
# (engine/prefix_cache.py), and the other sequences wait for each chunk.
TORCH_CHUNK_TOKENS = 512
# From this number of rows on, a CPU multiplies float32 copies of float16 weight blocks faster than the weight itself.
FP16_BLOCK_MIN_ROWS = 4
# Weight rows per block: few enough that the float32 copy of a block stays in the CPU's cache.
FP16_BLOCK_ROWS = 512


class LlamaModel:
    """A Llama model and its KV cache on one device; only one thread at a time may use it.

    The model runs on the device and in the dtype of `weights`; packed weights need the native kernels.
    `context_length` is the number of tokens per slot, and `slots` is the maximum number of concurrent sequences.
    `threads` is the number of CPU threads; None selects it. `native` runs the model natively; None if it runs in torch.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: LlamaWeights[Tensor] | LlamaWeights[PackedMatrix],
        *,
        context_length: int,
        slots: int,
        cpu_kernels: CpuKernels = "auto",
        threads: int | None = None,
    ) -> None:
        self.config = config
        self.weights: LlamaWeights[Any] = weights
        self.context_length = context_length
        self.slots = slots
        self.vocab_size = config.vocab_size
        self.device = weights.norm.device
        self.dtype = weights.norm.dtype
        with torch.inference_mode():
            self.kv_cache = KVCache(config, slots, context_length, weights.norm)
            self.rotary = _rotary_table(config, context_length, weights.norm)
        if self.device.type == "cuda":  # sum in float32, even if a matrix product is split
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self._linear: Callable[[Tensor, Tensor], Tensor] = linear
        if self.device.type == "cpu" and self.dtype == torch.float16:
            self._linear = _fp16_linear_cpu
        # On a CPU, attention over 16-bit keys is slower and less exact than attention over float32 copies of them.
        self._widen = self.device.type == "cpu" and self.dtype != torch.float32
        is_small = weights.parameters * self.dtype.itemsize < SMALL_MODEL_BYTES
        self.threads = threads or (1 if is_small else CPU_THREADS)
        self.native = self._native_decoder(cpu_kernels) if self.device.type == "cpu" else None
        self.chunk_invariant = self.native is not None
        self.prefill_chunk_tokens = self.native.prefill_rows if self.native else TORCH_CHUNK_TOKENS
        if self.device.type == "cuda":
            self.prefill_chunk_tokens = cuda_chunk_tokens(torch.cuda.get_device_name(self.device), weights.parameters)

    def _native_decoder(self, cpu_kernels: CpuKernels) -> NativeDecoder | None:
        """Return the decoder in C++, or log why it is unavailable and return None."""
        try:
            if cpu_kernels == "torch":
                raise NativeUnavailable("--cpu-kernels is torch")
            if self.dtype != torch.float16:
                raise NativeUnavailable(f"the native kernels support only torch.float16; --dtype is {self.dtype}")
            native = NativeDecoder(self.config, self.weights, self.kv_cache, self.rotary, threads=self.threads)
        except NativeUnavailable as reason:
            if isinstance(self.weights.head, PackedMatrix):
                raise EngineError(f"packed weights need the native kernels: {reason}") from reason
            logger.warning("running in torch, which is slower: %s", reason)
            return None
        logger.info("running natively with %s, threads: %d", native.instructions, self.threads)
        return native

    @property
    def kernels(self) -> str:
        """The family of the native kernels, portable or amx; empty if the model does not run natively."""
        return self.native.kernels if self.native else ""

    @property
    def memory_bytes(self) -> int:
        """Memory in bytes: all that torch has allocated on a CUDA device, otherwise weights and KV cache."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return self.weights.size_bytes + self.kv_cache.nbytes

    def prefill(self, slot: int, token_ids: list[int], position: int) -> Tensor:  # (vocab_size,)
        """Append `token_ids` to the first `position` tokens of the slot; return float32 logits after the last one.

        A long prompt may be passed in chunks. Cached tokens from `position` on are overwritten.

        Raises:
            EngineError: the slot does not exist, or the tokens do not fit.
            OutOfMemory: the device is out of memory.
        """
        end = position + len(token_ids)
        self._check(slot, position, end)
        if self.native:
            return self.native.prefill(slot, token_ids, position)
        self._set_num_threads()
        try:
            return self._prefill(slot, token_ids, position, end)
        except torch.OutOfMemoryError as error:
            reason = str(error)
        # The frames of the error keep the tensors of the failed prefill alive until the except block ends.
        torch.cuda.empty_cache()
        raise OutOfMemory(f"out of memory in a prefill of {len(token_ids)} tokens: {reason}")

    @torch.inference_mode()
    def _prefill(self, slot: int, token_ids: list[int], position: int, end: int) -> Tensor:  # (vocab_size,)
        x = self._embed(token_ids)  # (tokens, hidden_size)
        cos, sin = (table[position:end, None] for table in self.rotary)  # (tokens, 1, head_dim)
        mask = self._chunk_mask(position, end)
        for weights, cache in zip(self.weights.layers, self.kv_cache.layers, strict=True):
            q, k, v = self._qkv(weights, x, cos, sin)
            attended = self._attend_tokens(cache[slot], q, k, v, position, mask)
            x = self._finish_layer(weights, x, attended)
        return self._logits(x[-1:])[0]

    def decode(self, slots: list[int], token_ids: list[int], positions: list[int]) -> Tensor:  # (rows, vocab_size)
        """Append one token to each of `slots`, which hold `positions` tokens; return float32 logits after each.

        On a CPU, the other rows never change the bits of a row, and only the native kernels read the weights once for
        all rows.

        Raises:
            EngineError: a slot does not exist or is full.
        """
        for slot, position in zip(slots, positions, strict=True):
            self._check(slot, position, position + 1)
        if self.native:
            return self.native.decode(slots, token_ids, positions)
        if self.device.type == "cuda":
            return self._decode(slots, token_ids, positions)
        self._set_num_threads()
        # One by one: torch sums matrix products of several rows in another order, which would change bits.
        rows = zip(slots, token_ids, positions, strict=True)
        return torch.cat([self._decode([slot], [token_id], [position]) for slot, token_id, position in rows])

    @torch.inference_mode()
    def _decode(self, slots: list[int], token_ids: list[int], positions: list[int]) -> Tensor:  # (rows, vocab_size)
        x = self._embed(token_ids)  # (rows, hidden_size)
        cos, sin = (table[positions].unsqueeze(1) for table in self.rotary)  # (rows, 1, head_dim)
        for weights, cache in zip(self.weights.layers, self.kv_cache.layers, strict=True):
            q, k, v = self._qkv(weights, x, cos, sin)
            rows = [
                self._attend_row(cache[slot], q[row], k[row], v[row], position)
                for row, (slot, position) in enumerate(zip(slots, positions, strict=True))
            ]
            x = self._finish_layer(weights, x, rows[0] if len(rows) == 1 else torch.cat(rows))
        return self._logits(x)

    def _set_num_threads(self) -> None:
        """Set torch's number of threads for this model; torch keeps a separate number for each calling thread."""
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads)

    def _check(self, slot: int, start: int, end: int) -> None:
        if not (0 <= slot < self.slots and 0 <= start < end <= self.context_length):
            raise EngineError(
                f"slot {slot} has no room for tokens {start}:{end}; "
                f"the KV cache has {self.slots} slots of {self.context_length} tokens"
            )

    def _embed(self, token_ids: list[int]) -> Tensor:  # (tokens, hidden_size)
        return embedding(torch.tensor(token_ids, device=self.device), self.weights.embedding)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:  # (tokens, hidden_size)
        # rms_norm computes the mean of squares in float32 for all dtypes.
        return rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def _qkv(self, weights: LayerWeights[Tensor], x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (tokens, heads, head_dim), and keys and values, each (tokens, kv_heads, head_dim).

        Queries and keys are rotated.
        """
        config = self.config
        qkv = self._linear(self._norm(x, weights.attention_norm), weights.qkv)
        qkv = qkv.view(x.shape[0], config.heads + 2 * config.kv_heads, config.head_dim)  # one row per head
        rotated = _rotate(qkv[:, : -config.kv_heads], cos, sin)  # queries and keys together
        return rotated[:, : config.heads], rotated[:, config.heads :], qkv[:, -config.kv_heads :]

    def _attend_row(self, cached: Slot, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:  # (1, query_size)
        """Compute one token's attention over its slot: q (heads, head_dim), k and v (kv_heads, head_dim)."""
        keys, values = cached
        keys[0, :, position] = k
        values[0, :, position] = v
        # Heads that share a key attend to the same prefix, so they can be passed as one query sequence without a mask.
        q = q.view(1, self.config.kv_heads, -1, self.config.head_dim)
        return self._attention(q, keys[:, :, : position + 1], values[:, :, : position + 1]).view(1, -1)

    def _attend_tokens(
        self, cached: Slot, q: Tensor, k: Tensor, v: Tensor, position: int, mask: Tensor | None
    ) -> Tensor:  # (tokens, query_size)
        """Compute causal attention of tokens: q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim)."""
        keys, values = cached
        end = position + q.shape[0]
        keys[0, :, position:end] = k.transpose(0, 1)
        values[0, :, position:end] = v.transpose(0, 1)
        q = q.transpose(0, 1).unsqueeze(0)  # (1, heads, tokens, head_dim)
        attended = self._attention(q, keys[:, :, :end], values[:, :, :end], mask, causal=mask is None)
        return attended[0].transpose(0, 1).flatten(1)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:  # shape of q, (1, heads or kv_heads, queries, head_dim)
        if self._widen:
            q, k, v = q.float(), k.float(), v.float()
        grouped = q.shape[1] != k.shape[1]
        attended = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
        return attended.to(self.dtype) if self._widen else attended

    def _chunk_mask(self, position: int, end: int) -> Tensor | None:  # (tokens, end)
        """Return the causal mask of a chunk after cached tokens; None at position 0, where torch's causal mask fits."""
        if position == 0:
            return None
        if self.device.type == "cuda":  # flash attention takes this mask, but no mask of numbers
            # Imported late, because it imports Triton, whose environment build.py sets.
            from torch.nn.attention.bias import causal_lower_right

            return causal_lower_right(end - position, end)
        return torch.ones(end - position, end, dtype=torch.bool, device=self.device).tril(position)

    def _finish_layer(
        self, weights: LayerWeights[Tensor], x: Tensor, attended: Tensor
    ) -> Tensor:  # (tokens, hidden_size)
        x = x + self._linear(attended, weights.output)
        gate_up = self._linear(self._norm(x, weights.mlp_norm), weights.gate_up)
        gate, up = gate_up.chunk(2, dim=-1)  # (tokens, intermediate_size) each
        return x + self._linear(silu(gate).mul_(up), weights.down)  # SwiGLU

    def _logits(self, x: Tensor) -> Tensor:  # (rows, hidden_size) -> (rows, vocab_size)
        return self._linear(self._norm(x, self.weights.norm), self.weights.head).float()


def _rotary_table(config: LlamaConfig, context_length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and signed sines, each (context_length, head_dim), in the weights' dtype as in transformers.

    Source: Su et al. 2021 (RoFormer). The sines of the first half are negated here, so `_rotate` needs no negation.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = torch.tensor([config.rope_theta**exponent for exponent in exponents.tolist()], dtype=torch.float32)
    angles = torch.arange(context_length)[:, None] / frequencies  # (context_length, head_dim / 2)
    # The functions of the C library: those of torch gave another table in 2 of 622 starts, for an unknown reason.
    cos, sin = (_map(function, angles) for function in (math.cos, math.sin))
    table = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return table[0].to(like.device, like.dtype), table[1].to(like.device, like.dtype)


def _map(function: Callable[[float], float], numbers: Tensor) -> Tensor:  # any shape, float64
    return torch.tensor([function(number) for number in numbers.flatten().tolist()], dtype=torch.float64).view(
        numbers.shape
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (tokens, heads, head_dim)
    """Apply the rotary embedding; like transformers' rotate_half, it pairs the first half of a head with the second."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def _fp16_linear_cpu(x: Tensor, weight: Tensor) -> Tensor:  # (rows, in), (out, in) -> (rows, out)
    """Compute `linear` in float16 on a CPU without float16 arithmetic, with sums in float32.

    For a few rows, torch's kernel is as fast as the memory allows. For more rows it is up to ten times slower than
    float32. Therefore the weight is converted to float32 block by block, and never exists in float32 as a whole.
    """
    if x.shape[0] < FP16_BLOCK_MIN_ROWS:
        return linear(x, weight)
    x = x.float()
    blocks = (weight[start : start + FP16_BLOCK_ROWS] for start in range(0, weight.shape[0], FP16_BLOCK_ROWS))
    return torch.cat([linear(x, block.float()) for block in blocks], dim=-1).half()
