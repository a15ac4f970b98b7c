"""Triton kernels of the attention in a decode step: rotary embedding, the KV cache, and the attention itself.

Keys and values are read once; sums are in float32, whatever the dtype of the tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens of a slot's KV cache that one program attends to, and how many of them at a time.
SPLIT_TOKENS = 128
BLOCK_TOKENS = 64
MIN_QUERIES = 16  # rows that a matrix unit wants at least


@triton.jit
def _rotate_kernel(
    qkv,  # (rows, heads + 2 * kv_heads, 2 * half)
    cosines,  # (context_length, 2 * half)
    sines,  # (context_length, 2 * half), negative in the first half
    slots,  # (rows,)
    positions,  # (rows,), below zero in a row that only fills up the step
    queries,  # (rows, heads, 2 * half)
    keys,  # (slots, kv_heads, context_length, 2 * half)
    values,  # as keys
    heads,
    kv_heads,
    context_length,
    half,
    BLOCK_HALF: tl.constexpr,
):
    """Rotary embedding of one head's query or key; keys and values go to the slot's KV cache."""
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row).to(tl.int64)
    if position >= 0:
        at = tl.arange(0, BLOCK_HALF)
        inside = at < half
        place = qkv + (row * (heads + 2 * kv_heads) + head) * 2 * half + at
        low = tl.load(place, mask=inside).to(tl.float32)
        high = tl.load(place + half, mask=inside).to(tl.float32)
        if head < heads + kv_heads:
            table = position * 2 * half + at
            cosine = tl.load(cosines + table, mask=inside).to(tl.float32)
            sine = tl.load(sines + table + half, mask=inside).to(tl.float32)
            turned = low * cosine - high * sine
            high = high * cosine + low * sine
            low = turned
        if head < heads:
            target = queries + (row * heads + head) * 2 * half + at
            tl.store(target, low, mask=inside)
            tl.store(target + half, high, mask=inside)
        else:
            kv_head = (head - heads) % kv_heads
            slot = tl.load(slots + row).to(tl.int64)
            offset = ((slot * kv_heads + kv_head) * context_length + position) * 2 * half + at
            if head < heads + kv_heads:
                tl.store(keys + offset, low, mask=inside)
                tl.store(keys + offset + half, high, mask=inside)
            else:
                tl.store(values + offset, low, mask=inside)
                tl.store(values + offset + half, high, mask=inside)


@triton.jit
def _attend_kernel(
    queries,  # (rows, heads, head_dim)
    keys,  # (slots, kv_heads, context_length, head_dim)
    values,  # as keys
    slots,  # (rows,)
    positions,  # (rows,)
    parts,  # (rows, heads, splits, head_dim) float32
    scales,  # (rows, heads, splits) float32
    heads,
    kv_heads,
    context_length,
    head_dim,
    factor,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One part of the context, for the queries that share a key: their means over it, and the logs of their weights.

    Dao et al. 2023 (Flash-Decoding): the parts are read side by side and put together afterwards.
    """
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tokens = tl.load(positions + row) + 1
    member = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    in_group, in_head = member < GROUP, dim < head_dim
    head = kv_head * GROUP + member
    mask = in_group[:, None] & in_head[None, :]
    place = (row * heads + head) * tl.num_programs(2) + split
    begin = split * SPLIT
    if begin >= tokens:
        tl.store(scales + place, tl.full((BLOCK_GROUP,), float("-inf"), tl.float32), mask=in_group)
    else:
        query = tl.load(queries + (row * heads + head)[:, None] * head_dim + dim[None, :], mask=mask, other=0.0)
        slot = tl.load(slots + row).to(tl.int64)
        base = (slot * kv_heads + kv_head) * context_length * head_dim
        highest = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
        weight_sum = tl.zeros((BLOCK_GROUP,), tl.float32)
        sums = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
        for start in range(begin, tl.minimum(begin + SPLIT, tokens), BLOCK):
            token = start + tl.arange(0, BLOCK)
            seen = token < tokens
            offset = base + token[:, None].to(tl.int64) * head_dim + dim[None, :]
            there = seen[:, None] & in_head[None, :]
            key = tl.load(keys + offset, mask=there, other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, axis=1))
            shrink = tl.exp(highest - higher)
            weights = tl.exp(scores - higher[:, None])
            value = tl.load(values + offset, mask=there, other=0.0)
            weight_sum = weight_sum * shrink + tl.sum(weights, axis=1)
            sums = sums * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            highest = higher
        tl.store(parts + place[:, None] * head_dim + dim[None, :], sums / weight_sum[:, None], mask=mask)
        tl.store(scales + place, highest + tl.log(weight_sum), mask=in_group)


@triton.jit
def _combine_kernel(
    parts,  # (rows * heads, splits, head_dim) float32
    scales,  # (rows * heads, splits) float32
    out,  # (rows * heads, head_dim)
    splits,
    head_dim,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """The mean over all parts of the context; zeros in a row without any."""
    head = tl.program_id(0)
    split, dim = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_DIM)
    in_head = dim < head_dim
    scale = tl.load(scales + head * splits + split, mask=split < splits, other=float("-inf"))
    used = scale > float("-inf")
    highest = tl.maximum(tl.max(scale, axis=0), -1e30)  # finite also where there is nothing
    weights = tl.where(used, tl.exp(scale - highest), 0.0)
    place = (head * splits + split)[:, None] * head_dim + dim[None, :]
    values = tl.load(parts + place, mask=used[:, None] & in_head[None, :], other=0.0)
    total = tl.maximum(tl.sum(weights, axis=0), 1e-30)
    mean = tl.sum(values * weights[:, None], axis=0) / total
    tl.store(out + head * head_dim + dim, mean, mask=in_head)


def rotate_and_store(
    qkv: Tensor, rotary: tuple[Tensor, Tensor], slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> Tensor:  # (rows, (heads + 2 * kv_heads) * head_dim) -> (rows, heads, head_dim)
    """The rotated queries; rotated keys and plain values go to `positions` (rows,) of `slots` (rows,).

    Rows with a position below zero store nothing, and their queries are undefined.
    """
    _, kv_heads, context_length, head_dim = keys.shape
    rows = qkv.shape[0]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    queries = qkv.new_empty((rows, heads, head_dim))
    half = head_dim // 2
    _rotate_kernel[(rows, heads + 2 * kv_heads)](
        qkv,
        *rotary,
        slots,
        positions,
        queries,
        keys,
        values,
        heads,
        kv_heads,
        context_length,
        half,
        BLOCK_HALF=triton.next_power_of_2(half),
        num_warps=1,
    )
    return queries


def attend(
    queries: Tensor, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> Tensor:  # (rows, heads, head_dim) -> (rows, heads * head_dim)
    """Each row's attention to the tokens of its slot up to its position; zeros where that is below zero."""
    _, kv_heads, context_length, head_dim = keys.shape
    rows, heads, _ = queries.shape
    group = heads // kv_heads
    splits = triton.cdiv(context_length, SPLIT_TOKENS)
    parts = queries.new_empty((rows, heads, splits, head_dim), dtype=torch.float32)
    scales = queries.new_empty((rows, heads, splits), dtype=torch.float32)
    out = queries.new_empty((rows, heads * head_dim))
    block_dim = max(MIN_QUERIES, triton.next_power_of_2(head_dim))
    _attend_kernel[(rows, kv_heads, splits)](
        queries,
        keys,
        values,
        slots,
        positions,
        parts,
        scales,
        heads,
        kv_heads,
        context_length,
        head_dim,
        head_dim**-0.5,
        SPLIT=SPLIT_TOKENS,
        BLOCK=BLOCK_TOKENS,
        GROUP=group,
        BLOCK_GROUP=max(MIN_QUERIES, triton.next_power_of_2(group)),
        BLOCK_DIM=block_dim,
        num_warps=4,
    )
    _combine_kernel[(rows * heads,)](
        parts,
        scales,
        out,
        splits,
        head_dim,
        BLOCK_SPLITS=triton.next_power_of_2(splits),
        BLOCK_DIM=block_dim,
        num_warps=4,
    )
    return out
