"""Triton kernels for attention in a decode step: rotary embedding, KV cache writes, and split-K attention.

Keys and values are read once. Sums are in float32 for any dtype of the tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens of a slot's KV cache that one program attends to per iteration.
BLOCK_TOKENS = 64
# Programs per row over which a row's tokens are split: enough that one row fills a large card.
PROGRAMS_PER_ROW = 256
MIN_QUERIES = 16  # minimum number of rows of tl.dot


@triton.jit
def _rotate_and_store_kernel(
    qkv,  # (rows, heads + 2 * kv_heads, 2 * half)
    cosines,  # (context_length, 2 * half)
    sines,  # (context_length, 2 * half), negative in the first half
    slots,  # (rows,)
    positions,  # (rows,), negative for padding rows
    queries,  # (rows, heads, 2 * half)
    keys,  # (slots, kv_heads, context_length, 2 * half)
    values,  # as keys
    heads,
    kv_heads,
    context_length,
    half,
    BLOCK_HALF: tl.constexpr,
):
    """Apply the rotary embedding to one head's query or key; write keys and values to the slot's KV cache."""
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row).to(tl.int64)
    if position >= 0:
        at = tl.arange(0, BLOCK_HALF)
        mask = at < half
        source = qkv + (row * (heads + 2 * kv_heads) + head) * 2 * half + at
        low = tl.load(source, mask=mask).to(tl.float32)
        high = tl.load(source + half, mask=mask).to(tl.float32)
        if head < heads + kv_heads:
            table = position * 2 * half + at
            cosine = tl.load(cosines + table, mask=mask).to(tl.float32)
            sine = tl.load(sines + table + half, mask=mask).to(tl.float32)
            rotated_low = low * cosine - high * sine
            high = high * cosine + low * sine
            low = rotated_low
        if head < heads:
            target = queries + (row * heads + head) * 2 * half + at
            tl.store(target, low, mask=mask)
            tl.store(target + half, high, mask=mask)
        else:
            kv_head = (head - heads) % kv_heads
            slot = tl.load(slots + row).to(tl.int64)
            offset = ((slot * kv_heads + kv_head) * context_length + position) * 2 * half + at
            if head < heads + kv_heads:
                tl.store(keys + offset, low, mask=mask)
                tl.store(keys + offset + half, high, mask=mask)
            else:
                tl.store(values + offset, low, mask=mask)
                tl.store(values + offset + half, high, mask=mask)


@triton.jit
def _accumulate(scores, value, max_score, weight_sum, sums):
    """Add one block of the context to a running softmax (Milakov & Gimelshein 2018, online softmax).

    Shapes: scores (queries, tokens), value (tokens, head_dim), max_score and weight_sum (queries,), sums (queries,
    head_dim); the last three are returned updated.
    """
    new_max = tl.maximum(max_score, tl.max(scores, axis=1))
    rescale = tl.exp(max_score - new_max)
    weights = tl.exp(scores - new_max[:, None])
    weight_sum = weight_sum * rescale + tl.sum(weights, axis=1)
    sums = sums * rescale[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return new_max, weight_sum, sums


@triton.jit
def _split_attention_kernel(
    queries,  # (rows, heads, head_dim)
    keys,  # (slots, kv_heads, context_length, head_dim)
    values,  # as keys
    slots,  # (rows,)
    positions,  # (rows,)
    partials,  # (rows, heads, splits, head_dim) float32
    log_sum_exps,  # (rows, heads, splits) float32
    heads,
    kv_heads,
    context_length,
    head_dim,
    factor,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Attend to one split of the context with the queries that share a key; store partial means and log-sum-exps.

    Dao et al. 2023 (Flash-Decoding): the splits are processed in parallel and combined afterwards. Their length follows
    from the row's own number of tokens.
    """
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tokens = tl.load(positions + row) + 1
    split_tokens = tl.cdiv(tl.cdiv(tokens, BLOCK), tl.num_programs(2)) * BLOCK
    member, dim = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_DIM)
    in_group, in_head, head = member < GROUP, dim < head_dim, kv_head * GROUP + member
    mask = in_group[:, None] & in_head[None, :]
    index, begin = (row * heads + head) * tl.num_programs(2) + split, split * split_tokens
    if begin >= tokens:
        tl.store(log_sum_exps + index, tl.full((BLOCK_GROUP,), float("-inf"), tl.float32), mask=in_group)
    else:
        query = tl.load(queries + (row * heads + head)[:, None] * head_dim + dim[None, :], mask=mask, other=0.0)
        base = (tl.load(slots + row).to(tl.int64) * kv_heads + kv_head) * context_length * head_dim
        max_score = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
        weight_sum = tl.zeros((BLOCK_GROUP,), tl.float32)
        sums = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
        for start in range(begin, tl.minimum(begin + split_tokens, tokens), BLOCK):
            token = start + tl.arange(0, BLOCK)
            seen = token < tokens
            offset = base + token[:, None].to(tl.int64) * head_dim + dim[None, :]
            kv_mask = seen[:, None] & in_head[None, :]
            key = tl.load(keys + offset, mask=kv_mask, other=0.0)
            value = tl.load(values + offset, mask=kv_mask, other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
            scores = tl.where(seen[None, :], scores, float("-inf"))
            max_score, weight_sum, sums = _accumulate(scores, value, max_score, weight_sum, sums)
        tl.store(partials + index[:, None] * head_dim + dim[None, :], sums / weight_sum[:, None], mask=mask)
        tl.store(log_sum_exps + index, max_score + tl.log(weight_sum), mask=in_group)


@triton.jit
def _combine_kernel(
    partials,  # (rows * heads, splits, head_dim) float32
    log_sum_exps,  # (rows * heads, splits) float32
    out,  # (rows * heads, head_dim)
    splits,
    head_dim,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Combine the partial means over all splits of the context; a row without tokens gets zeros."""
    head = tl.program_id(0)
    split, dim = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_DIM)
    in_head = dim < head_dim
    log_sum_exp = tl.load(log_sum_exps + head * splits + split, mask=split < splits, other=float("-inf"))
    used = log_sum_exp > float("-inf")
    max_score = tl.maximum(tl.max(log_sum_exp, axis=0), -1e30)  # finite even for a row without tokens
    weights = tl.where(used, tl.exp(log_sum_exp - max_score), 0.0)
    offset = (head * splits + split)[:, None] * head_dim + dim[None, :]
    values = tl.load(partials + offset, mask=used[:, None] & in_head[None, :], other=0.0)
    total = tl.maximum(tl.sum(weights, axis=0), 1e-30)
    mean = tl.sum(values * weights[:, None], axis=0) / total
    tl.store(out + head * head_dim + dim, mean, mask=in_head)


def rotate_and_store(
    qkv: Tensor, rotary: tuple[Tensor, Tensor], slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> Tensor:  # (rows, (heads + 2 * kv_heads) * head_dim) -> (rows, heads, head_dim)
    """Return the rotated queries; write rotated keys and plain values to `positions` (rows,) of `slots` (rows,).

    Rows with a negative position store nothing, and their queries are undefined.
    """
    _, kv_heads, context_length, head_dim = keys.shape
    rows = qkv.shape[0]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    queries = qkv.new_empty((rows, heads, head_dim))
    half = head_dim // 2
    _rotate_and_store_kernel[(rows, heads + 2 * kv_heads)](
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


def split_count(kv_heads: int, context_length: int) -> int:
    """Return the maximum number of splits of a row's tokens per head that holds keys, a power of two."""
    blocks = triton.cdiv(context_length, BLOCK_TOKENS)
    return int(min(triton.next_power_of_2(triton.cdiv(PROGRAMS_PER_ROW, kv_heads)), triton.next_power_of_2(blocks)))


def attend(
    queries: Tensor, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> Tensor:  # (rows, heads, head_dim) -> (rows, heads * head_dim)
    """Return each row's attention to the tokens of its slot up to its position; zeros if that is negative."""
    _, kv_heads, context_length, head_dim = keys.shape
    rows, heads, _ = queries.shape
    group = heads // kv_heads
    splits = split_count(kv_heads, context_length)
    partials = queries.new_empty((rows, heads, splits, head_dim), dtype=torch.float32)
    log_sum_exps = queries.new_empty((rows, heads, splits), dtype=torch.float32)
    out = queries.new_empty((rows, heads * head_dim))
    block_dim = max(MIN_QUERIES, triton.next_power_of_2(head_dim))
    _split_attention_kernel[(rows, kv_heads, splits)](
        queries,
        keys,
        values,
        slots,
        positions,
        partials,
        log_sum_exps,
        heads,
        kv_heads,
        context_length,
        head_dim,
        head_dim**-0.5,
        BLOCK=BLOCK_TOKENS,
        GROUP=group,
        BLOCK_GROUP=max(MIN_QUERIES, triton.next_power_of_2(group)),
        BLOCK_DIM=block_dim,
        num_warps=4,
    )
    _combine_kernel[(rows * heads,)](
        partials,
        log_sum_exps,
        out,
        splits,
        head_dim,
        BLOCK_SPLITS=triton.next_power_of_2(splits),
        BLOCK_DIM=block_dim,
        num_warps=4,
    )
    return out
