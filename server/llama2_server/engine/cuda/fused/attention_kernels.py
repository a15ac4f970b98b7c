"""One Triton kernel for the attention of a decode step: rotary embedding, cache write, split attention, combination.

It requests the output projection into the L2 cache at the same time: the kernel after it reads these weights.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2_server.engine.cuda.attention_kernels import BLOCK_TOKENS, MIN_QUERIES, _accumulate, split_count

CACHE_LINE_BYTES = 128
PREFETCH_LANES = 128  # the threads of a program


@triton.jit
def _prefetch(weight, elements, ELEMENTS_PER_LINE: tl.constexpr, LANES: tl.constexpr):
    """Request this program's share of the cache lines of a weight into the L2 cache."""
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    lines = tl.cdiv(elements, ELEMENTS_PER_LINE)
    for first in range(program * LANES, lines, programs * LANES):
        line = tl.minimum(first + tl.arange(0, LANES), lines - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [(weight + line.to(tl.int64) * ELEMENTS_PER_LINE).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _rotated(source, cosines, sines, table, dim, mask, HEAD_DIM: tl.constexpr):
    """Load heads and apply the rotary embedding; `sines` are negative in the first half of a head."""
    value = tl.load(source + dim, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(source + (dim + HEAD_DIM // 2) % HEAD_DIM, mask=mask, other=0.0).to(tl.float32)
    cosine = tl.load(cosines + table + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
    sine = tl.load(sines + table + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
    return value * cosine + partner * sine


@triton.jit
def _attend_split(
    query, keys, values, base, begin, end, factor, max_score, weight_sum, sums,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Continue a running softmax over the cached tokens from `begin` to `end`."""
    dim = tl.arange(0, BLOCK_DIM)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        seen = token < end
        offset = base + token[:, None].to(tl.int64) * HEAD_DIM + dim[None, :]
        mask = seen[:, None] & (dim < HEAD_DIM)[None, :]
        key = tl.load(keys + offset, mask=mask, other=0.0)
        value = tl.load(values + offset, mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
        scores = tl.where(seen[None, :], scores, float("-inf"))
        max_score, weight_sum, sums = _accumulate(scores, value, max_score, weight_sum, sums)
    return max_score, weight_sum, sums


@triton.jit
def _combined(partials, statistics, first, splits, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Return the mean over `splits` partial results from the index `first` on, in their order."""
    member, dim = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_DIM)
    max_score = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((BLOCK_GROUP,), tl.float32)
    sums = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
    for index in range(first, first + splits):
        # Other programs wrote them: from the L2 cache, because this multiprocessor's L1 cache may be older.
        split_max = tl.load(statistics + index * 2 * BLOCK_GROUP + member, cache_modifier=".cg")
        split_weight = tl.load(statistics + (index * 2 + 1) * BLOCK_GROUP + member, cache_modifier=".cg")
        at = (index * BLOCK_GROUP + member)[:, None] * BLOCK_DIM + dim[None, :]
        split_sums = tl.load(partials + at, cache_modifier=".cg")
        new_max = tl.maximum(max_score, split_max)
        old_factor, split_factor = tl.exp(max_score - new_max), tl.exp(split_max - new_max)
        weight_sum = weight_sum * old_factor + split_weight * split_factor
        sums = sums * old_factor[:, None] + split_sums * split_factor[:, None]
        max_score = new_max
    return sums / weight_sum[:, None]


@triton.jit
def _attention_kernel(
    qkv,  # (rows, heads + 2 * kv_heads, HEAD_DIM)
    cosines, sines,  # (context_length, HEAD_DIM)
    slots, positions,  # (rows,), positions negative for padding rows
    keys, values,  # (slots, kv_heads, context_length, HEAD_DIM)
    partials,  # (rows, kv_heads, splits, BLOCK_GROUP, BLOCK_DIM) float32
    statistics,  # (rows, kv_heads, splits, 2, BLOCK_GROUP) float32: largest score, sum of weights
    arrived,  # (rows, kv_heads) int32, zero before and after
    next_weight, next_elements,  # of the output projection
    out,  # (rows, heads, HEAD_DIM)
    context_length, factor,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ELEMENTS_PER_LINE: tl.constexpr, PREFETCH: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attend to one split of a row's tokens; the first split adds the new token, the last one to arrive combines."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if PREFETCH:
        _prefetch(next_weight, next_elements, ELEMENTS_PER_LINE, LANES)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row, kv_head, split, splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    position = tl.load(positions + row)
    split_tokens = tl.maximum(tl.cdiv(tl.cdiv(position, BLOCK), splits), 1) * BLOCK
    active = tl.maximum(tl.cdiv(position, split_tokens), 1)
    head = kv_head * GROUP + tl.arange(0, BLOCK_GROUP)[:, None]
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    mask = (tl.arange(0, BLOCK_GROUP)[:, None] < GROUP) & (dim < HEAD_DIM)
    target = out + (row * KV_HEADS * GROUP + head) * HEAD_DIM + dim
    if (position < 0) & (split == 0):
        tl.store(target, tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32), mask=mask)
    if (position >= 0) & (split < active):
        heads = qkv + row * (GROUP + 2) * KV_HEADS * HEAD_DIM
        table = position * HEAD_DIM
        query = _rotated(heads + head * HEAD_DIM, cosines, sines, table, dim, mask, HEAD_DIM).to(keys.dtype.element_ty)
        base = (tl.load(slots + row).to(tl.int64) * KV_HEADS + kv_head) * context_length * HEAD_DIM
        state = _start_split(
            query, heads, cosines, sines, table, keys, values, base + position * HEAD_DIM, kv_head, split, factor,
            KV_HEADS, GROUP, HEAD_DIM, BLOCK_GROUP, BLOCK_DIM,
        )  # fmt: skip
        max_score, weight_sum, sums = _attend_split(
            query, keys, values, base, split * split_tokens, tl.minimum((split + 1) * split_tokens, position), factor,
            state[0], state[1], state[2], HEAD_DIM, BLOCK_DIM, BLOCK,
        )  # fmt: skip
        index = row * KV_HEADS + kv_head
        _finish_split(
            partials, statistics, arrived + index, target, mask, index * splits, split, active,
            max_score, weight_sum, sums, BLOCK_GROUP, BLOCK_DIM,
        )  # fmt: skip


@triton.jit
def _start_split(
    query, heads, cosines, sines, table, keys, values, place, kv_head, split, factor,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Return the running softmax before a split's cached tokens; the first split writes and includes the new token."""
    max_score = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((BLOCK_GROUP,), tl.float32)
    sums = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
    if split == 0:
        dim = tl.arange(0, BLOCK_DIM)
        in_head = dim < HEAD_DIM
        key_source = heads + (KV_HEADS * GROUP + kv_head) * HEAD_DIM
        key = _rotated(key_source, cosines, sines, table, dim, in_head, HEAD_DIM).to(keys.dtype.element_ty)
        value = tl.load(key_source + KV_HEADS * HEAD_DIM + dim, mask=in_head, other=0.0)
        tl.store(keys + place + dim, key, mask=in_head)
        tl.store(values + place + dim, value, mask=in_head)
        max_score = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * factor
        weight_sum = tl.full((BLOCK_GROUP,), 1.0, tl.float32)
        sums = tl.broadcast_to(value.to(tl.float32)[None, :], (BLOCK_GROUP, BLOCK_DIM))
    return max_score, weight_sum, sums


@triton.jit
def _finish_split(
    partials, statistics, arrived, target, mask, first, split, active, max_score, weight_sum, sums,
    BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Store the result of a split; the last program of a head to arrive combines all and resets the counter."""
    if active == 1:
        tl.store(target, sums / weight_sum[:, None], mask=mask)
    else:
        member, dim = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_DIM)
        index = first + split
        tl.store(statistics + index * 2 * BLOCK_GROUP + member, max_score)
        tl.store(statistics + (index * 2 + 1) * BLOCK_GROUP + member, weight_sum)
        tl.store(partials + (index * BLOCK_GROUP + member)[:, None] * BLOCK_DIM + dim[None, :], sums)
        tl.debug_barrier()  # all threads have stored before one of them announces it
        before = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
        if before == active - 1:
            tl.debug_barrier()  # no thread loads before the announcements were read
            tl.store(target, _combined(partials, statistics, first, active, BLOCK_GROUP, BLOCK_DIM), mask=mask)
            tl.store(arrived, 0)


class Attention:
    """The attention of a step, with the buffers that its programs share; one object per number of rows.

    Args:
        rows: number of rows of a step.
        keys: the keys of one layer of the KV cache, (slots, kv_heads, context_length, head_dim).
        options: from `launch_options`.
    """

    def __init__(self, rows: int, heads: int, keys: Tensor, options: dict[str, Any]) -> None:
        _, self._kv_heads, self._context_length, self._head_dim = keys.shape
        self._group = heads // self._kv_heads
        self._splits = split_count(self._kv_heads, self._context_length)
        self._block_group = max(MIN_QUERIES, triton.next_power_of_2(self._group))
        self._block_dim = max(MIN_QUERIES, triton.next_power_of_2(self._head_dim))
        programs = (rows, self._kv_heads, self._splits)
        size = (*programs, self._block_group, self._block_dim)
        self._partials = keys.new_empty(size, dtype=torch.float32)
        self._statistics = keys.new_empty((*programs, 2, self._block_group), dtype=torch.float32)
        self._arrived = keys.new_zeros((rows, self._kv_heads), dtype=torch.int32)
        self._options = options

    def __call__(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        slots: Tensor,
        positions: Tensor,
        keys: Tensor,
        values: Tensor,
        next_weight: Tensor,
    ) -> Tensor:  # (rows, (heads + 2 * kv_heads) * head_dim) -> (rows, heads * head_dim)
        """Append rotated keys and values to `positions` of `slots`, and return each row's attention up to there.

        Rows with a negative position append nothing and get zeros. `next_weight` is requested into the L2 cache.
        """
        rows = qkv.shape[0]
        out = qkv.new_empty((rows, self._group * self._kv_heads * self._head_dim))
        _attention_kernel[(rows, self._kv_heads, self._splits)](
            qkv, *rotary, slots, positions, keys, values,
            self._partials, self._statistics, self._arrived, next_weight, next_weight.numel(), out,
            self._context_length, self._head_dim**-0.5,
            KV_HEADS=self._kv_heads, GROUP=self._group, HEAD_DIM=self._head_dim,
            BLOCK=BLOCK_TOKENS, BLOCK_GROUP=self._block_group, BLOCK_DIM=self._block_dim,
            ELEMENTS_PER_LINE=CACHE_LINE_BYTES // next_weight.element_size(),
            PREFETCH=qkv.device.type == "cuda", LANES=PREFETCH_LANES, num_warps=4, **self._options,
        )  # fmt: skip
        return out
