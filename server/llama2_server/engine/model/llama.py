"""The Llama forward pass and its KV cache, in plain torch.

Touvron et al. 2023 (arXiv:2307.09288). Names and conventions are those of transformers' modeling_llama, whose
checkpoints are read.
"""

import logging
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.kv_cache import KVCache, Slot
from llama2_server.engine.model.native_decoder import NativeDecoder
from llama2_server.engine.model.weights import LayerWeights, LlamaConfig, LlamaWeights
from llama2_server.engine.native.library import NativeUnavailable

logger = logging.getLogger(__name__)

CpuKernels = Literal["auto", "torch"]  # auto: the native steps wherever they are to be had

# A smaller model runs on one CPU thread: two would wait for one another longer than one takes alone, above all on a
# machine where something else runs.
SMALL_MODEL_BYTES = 32 * 1024 * 1024
# What torch takes by itself: the cores, or what OMP_NUM_THREADS says.
CPU_THREADS = torch.get_num_threads()
# A product of many rows in torch is fast from some hundreds on; the native one takes no more than these at a time. More
# would be faster still on a GPU, but only whole chunks are reused there (prefixes.py), and neighbours wait for one.
TORCH_CHUNK_TOKENS = 512
NATIVE_CHUNK_TOKENS = 48
# From this many rows on, float32 blocks of a float16 weight multiply faster on a CPU than the weight itself.
FP16_BLOCK_MIN_ROWS = 4
# Rows of the weight in a block: small enough that its float32 copy stays in the CPU's cache.
FP16_BLOCK_ROWS = 512


class Model(Protocol):
    """What the step loop needs of a model; tests drive it with a fake."""

    @property
    def vocab_size(self) -> int:
        """Logits a row."""

    @property
    def context_length(self) -> int:
        """Tokens that a slot holds."""

    @property
    def slots(self) -> int:
        """Sequences that fit in the KV cache at once."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its weights."""

    @property
    def memory_bytes(self) -> int:
        """What it takes of its device."""

    @property
    def prefill_chunk_tokens(self) -> int:
        """How many tokens of a prompt to prefill at once: enough to be fast, and no more, for others wait meanwhile."""

    @property
    def chunk_invariant(self) -> bool:
        """Whether keys and values are the same to the bit in whatever pieces they are computed, one by one included."""

    def prefill(self, slot: int, token_ids: list[int], position: int) -> Tensor:  # (vocab_size,)
        """Append tokens to the slot's `position` cached ones; float32 logits after the last of them."""

    def decode(self, slots: list[int], token_ids: list[int], positions: list[int]) -> Tensor:  # (rows, vocab_size)
        """Append one token to each slot; float32 logits after each."""


class LlamaModel:
    """A Llama and its KV cache, on one device. Not safe for use by two threads at once."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: LlamaWeights,
        *,
        context_length: int,
        slots: int,
        cpu_kernels: CpuKernels = "auto",
    ) -> None:
        self.config = config
        self.weights = weights
        self.context_length = context_length
        self.slots = slots
        self.vocab_size = config.vocab_size
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        with torch.inference_mode():
            self.kv_cache = KVCache(config, slots, context_length, weights.embedding)
            self.rotary = _rotary_table(config, context_length, weights.embedding)
        if self.device.type == "cuda":  # sums in float32, also where a product is split
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self._linear: Callable[[Tensor, Tensor], Tensor] = linear
        if self.device.type == "cpu" and self.dtype == torch.float16:
            self._linear = _fp16_linear_cpu
        # Attention over 16-bit keys is slower on a CPU than widening them first, and less exact.
        self._widen = self.device.type == "cpu" and self.dtype != torch.float32
        self._threads = 1 if weights.size_bytes < SMALL_MODEL_BYTES else CPU_THREADS
        self._native = self._native_decoder(cpu_kernels) if self.device.type == "cpu" else None
        self.chunk_invariant = self._native is not None
        self.prefill_chunk_tokens = NATIVE_CHUNK_TOKENS if self._native else TORCH_CHUNK_TOKENS

    def _native_decoder(self, cpu_kernels: CpuKernels) -> NativeDecoder | None:
        """The steps in C++, or None and a line in the log that says why it has to be torch's."""
        try:
            if cpu_kernels == "torch":
                raise NativeUnavailable("the settings ask for it (cpu_kernels)")
            if self.dtype != torch.float16:
                raise NativeUnavailable(f"the native step is for float16, and this is {self.dtype}")
            native = NativeDecoder(self.config, self.weights, self.kv_cache, self.rotary, threads=self._threads)
        except NativeUnavailable as reason:
            logger.warning("running in torch, which is slower: %s", reason)
            return None
        logger.info("running natively with %s, threads: %d", native.instructions, self._threads)
        return native

    @property
    def memory_bytes(self) -> int:
        """What it takes of its device: all that torch has allocated on CUDA, else weights and KV cache."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return self.weights.size_bytes + self.kv_cache.nbytes

    def prefill(self, slot: int, token_ids: list[int], position: int) -> Tensor:  # (vocab_size,)
        """Append `token_ids` to the `position` tokens in the slot's KV cache; float32 logits after the last one.

        A long prompt can come in chunks. What the slot held from `position` on is overwritten. Raises EngineError where
        the slot does not exist or the tokens do not fit.
        """
        end = position + len(token_ids)
        self._check(slot, position, end)
        if self._native:
            return self._native.prefill(slot, token_ids, position)
        self._set_num_threads()
        try:
            return self._prefill(slot, token_ids, position, end)
        except torch.OutOfMemoryError as error:
            reason = str(error)
        # Only here is what the failed prefill held let go of, by the frames of the error.
        torch.cuda.empty_cache()
        raise EngineError(f"out of memory in a prefill of {len(token_ids)} tokens: {reason}")

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
        """Append one token to each of `slots`, which hold `positions` tokens; float32 logits after each.

        On a CPU each row is the same bit for bit whatever the others; only natively do they share the reading of the
        weights. Raises EngineError where a slot does not exist or is full.
        """
        for slot, position in zip(slots, positions, strict=True):
            self._check(slot, position, position + 1)
        if self._native:
            return self._native.decode(slots, token_ids, positions)
        if self.device.type == "cuda":
            return self._decode(slots, token_ids, positions)
        self._set_num_threads()
        # One by one: torch's products of several rows add up in another order, and no neighbour may change a bit.
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
        """Have torch use this model's number of threads; it keeps one for each thread that calls it."""
        if self.device.type == "cpu":
            torch.set_num_threads(self._threads)

    def _check(self, slot: int, start: int, end: int) -> None:
        if not (0 <= slot < self.slots and 0 <= start < end <= self.context_length):
            raise EngineError(f"tokens {start}:{end} of slot {slot} in {self.slots} slots of {self.context_length}")

    def _embed(self, token_ids: list[int]) -> Tensor:  # (tokens, hidden_size)
        return embedding(torch.tensor(token_ids, device=self.device), self.weights.embedding)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:  # (tokens, hidden_size)
        # Takes the mean of squares in float32, whatever the dtype.
        return rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def _qkv(self, weights: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (tokens, heads, head_dim), rotated keys and plain values (tokens, kv_heads, head_dim)."""
        config = self.config
        qkv = self._linear(self._norm(x, weights.attention_norm), weights.qkv)
        qkv = qkv.view(x.shape[0], config.heads + 2 * config.kv_heads, config.head_dim)
        rotated = _rotate(qkv[:, : -config.kv_heads], cos, sin)  # queries and keys in one go
        return rotated[:, : config.heads], rotated[:, config.heads :], qkv[:, -config.kv_heads :]

    def _attend_row(self, cached: Slot, q: Tensor, k: Tensor, v: Tensor, position: int) -> Tensor:  # (1, query_size)
        """One token's attention to its slot: q (heads, head_dim), k and v (kv_heads, head_dim)."""
        keys, values = cached
        keys[0, :, position] = k
        values[0, :, position] = v
        # All heads that share a key see the same prefix: they can stand in for a sequence of queries without a mask.
        q = q.view(1, self.config.kv_heads, -1, self.config.head_dim)
        return self._attention(q, keys[:, :, : position + 1], values[:, :, : position + 1]).view(1, -1)

    def _attend_tokens(
        self, cached: Slot, q: Tensor, k: Tensor, v: Tensor, position: int, mask: Tensor | None
    ) -> Tensor:  # (tokens, query_size)
        """Causal attention of several tokens: q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim)."""
        keys, values = cached
        end = position + q.shape[0]
        keys[0, :, position:end] = k.transpose(0, 1)
        values[0, :, position:end] = v.transpose(0, 1)
        q = q.transpose(0, 1).unsqueeze(0)  # (1, heads, tokens, head_dim)
        attended = self._attention(q, keys[:, :, :end], values[:, :, :end], mask, causal=mask is None)
        return attended[0].transpose(0, 1).flatten(1)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:  # q's shape, (1, heads or kv_heads, queries, head_dim)
        if self._widen:
            q, k, v = q.float(), k.float(), v.float()
        grouped = q.shape[1] != k.shape[1]
        attended = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
        return attended.to(self.dtype) if self._widen else attended

    def _chunk_mask(self, position: int, end: int) -> Tensor | None:  # (tokens, end) bool
        """Who sees whom in a chunk behind cached tokens; None at the start, where torch's own causal mask will do."""
        if position == 0:
            return None
        return torch.ones(end - position, end, dtype=torch.bool, device=self.device).tril(position)

    def _finish_layer(self, weights: LayerWeights, x: Tensor, attended: Tensor) -> Tensor:  # (tokens, hidden_size)
        x = x + self._linear(attended, weights.output)
        gate, up = self._linear(self._norm(x, weights.mlp_norm), weights.gate_up).chunk(2, dim=-1)
        return x + self._linear(silu(gate).mul_(up), weights.down)  # SwiGLU

    def _logits(self, x: Tensor) -> Tensor:  # (rows, hidden_size) -> (rows, vocab_size)
        return self._linear(self._norm(x, self.weights.norm), self.weights.head).float()


def _rotary_table(config: LlamaConfig, context_length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of each position, (context_length, head_dim), in the weights' dtype as in transformers.

    Su et al. 2021 (RoFormer). The sine's sign for the first half is folded in, so `_rotate` needs no negation.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=like.device, dtype=torch.float32) / config.head_dim
    angles = torch.arange(context_length, device=like.device)[:, None] / config.rope_theta**exponents
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(like.dtype), torch.cat((-sin, sin), dim=-1).to(like.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (tokens, heads, head_dim)
    """Rotary embedding as transformers' rotate_half has it: a head's first half is paired with its second."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def _fp16_linear_cpu(x: Tensor, weight: Tensor) -> Tensor:  # (rows, in), (out, in) -> (rows, out)
    """`linear` for float16 on a CPU without float16 arithmetic, with sums in float32.

    For a row or two torch's own kernel is as fast as the memory. For more it is up to ten times slower than float32, so
    the weight is widened block by block: no float32 copy of it ever exists.
    """
    if x.shape[0] < FP16_BLOCK_MIN_ROWS:
        return linear(x, weight)
    x = x.float()
    blocks = (weight[start : start + FP16_BLOCK_ROWS] for start in range(0, weight.shape[0], FP16_BLOCK_ROWS))
    return torch.cat([linear(x, block.float()) for block in blocks], dim=-1).half()
