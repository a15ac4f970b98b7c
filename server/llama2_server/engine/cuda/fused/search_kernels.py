"""The search of the sampling kernels: the first token, in the order of the candidates, whose sum passes a threshold."""

import triton
import triton.language as tl

ID_BITS = tl.constexpr(20)
ID_MASK = tl.constexpr(2**20 - 1)
LAST_CODE = tl.constexpr(2**62)
"""A code after the codes of all tokens."""


@triton.jit
def code_of(logit, token):
    """Return numbers whose order is the order of the candidates: largest logit first, equal ones by id."""
    bits = tl.where(logit == 0, 0.0, logit).to(tl.int32, bitcast=True)  # -0 and 0 are equal
    key = tl.where(bits >= 0, ~bits, bits & 0x7FFFFFFF)
    return (key.to(tl.int64) << ID_BITS) | token.to(tl.int64)


@triton.jit
def logit_of(code):
    """Return the logits of codes."""
    key = (code >> ID_BITS).to(tl.int32)
    return tl.where(key < 0, ~key, key | -2147483648).to(tl.float32, bitcast=True)


@triton.jit
def _sums_of_ways(sums, factors, counts, BLOCK: tl.constexpr, LANES: tl.constexpr):  # counts (WAYS, LANES) -> (WAYS,)
    """Return the sum of the weights of the first `counts` candidates of each block."""
    lane = tl.arange(0, LANES)[None, :]
    block_sums = tl.load(sums + lane * BLOCK + counts - 1, mask=counts > 0, other=0.0)
    return tl.sum(block_sums * factors[None, :], axis=1)


@triton.jit
def sum_up_to(sums, factors, ends, BLOCK: tl.constexpr, LANES: tl.constexpr, WAYS: tl.constexpr):
    """Return the sum of the weights of the first `ends` candidates of each block, rounded as in the search."""
    counts = tl.broadcast_to(ends[None, :], (WAYS, LANES))
    return tl.max(_sums_of_ways(sums, factors, counts, BLOCK, LANES), axis=0)


@triton.jit
def _counts_up_to(codes, pivots, starts, ends, BLOCK: tl.constexpr, LANES: tl.constexpr, WAYS: tl.constexpr):
    """Return how many codes of each block, (WAYS, LANES), are at most a pivot; between `starts` and `ends`."""
    lane = tl.arange(0, LANES)[None, :]
    low = tl.broadcast_to(starts[None, :], (WAYS, LANES))
    high = tl.broadcast_to(ends[None, :], (WAYS, LANES))
    remaining = tl.max(ends - starts, axis=0)
    while remaining > 0:
        middle = (low + high) // 2
        active = low < high
        code = tl.load(codes + lane * BLOCK + middle, mask=active, other=LAST_CODE)
        after = active & (code <= pivots[:, None])
        high = tl.where(active & (code > pivots[:, None]), middle, high)
        low = tl.where(after, middle + 1, low)
        remaining = remaining // 2
    return low


@triton.jit
def weighted_search(
    codes, sums, factors, ends, reached, above,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """Return the first code whose sum is at least `reached` or is above `above`, and the counts of codes up to it.

    The sum is that of the weights, or with COUNT the number of codes. It is passed at the latest by the last of the
    first `ends` (LANES,) codes of the blocks.
    """
    lane, way = tl.arange(0, LANES), tl.arange(0, WAYS)
    starts = ends * 0
    remaining = tl.sum(ends, axis=0)
    while remaining > 1:
        used = starts < ends
        low = tl.min(tl.load(codes + lane * BLOCK + starts, mask=used, other=LAST_CODE), axis=0)
        high = tl.max(tl.load(codes + lane * BLOCK + ends - 1, mask=used, other=-LAST_CODE), axis=0)
        width = (high - low) // WAYS + 1
        pivots = low + width * (way + 1) - 1  # (WAYS,)
        counts = _counts_up_to(codes, pivots, starts, ends, BLOCK, LANES, WAYS)
        if COUNT:  # noqa: SIM108 - the kernel is compiled with one of the two
            found = tl.sum(counts, axis=1).to(tl.float64)
        else:
            found = _sums_of_ways(sums, factors, counts, BLOCK, LANES)
        passed = (found >= reached) | (found > above) | (pivots >= high)
        chosen = tl.min(tl.where(passed, way, WAYS), axis=0)
        before = tl.sum(tl.where((way == chosen - 1)[:, None], counts, 0), axis=0)
        starts = tl.where(chosen > 0, before, starts)
        ends = tl.sum(tl.where((way == chosen)[:, None], counts, 0), axis=0)
        remaining = tl.sum(ends - starts, axis=0)
    code = tl.min(tl.load(codes + lane * BLOCK + starts, mask=starts < ends, other=LAST_CODE), axis=0)
    return code, ends


@triton.jit
def rank_limit(codes, sums, factors, ends, top_k, BLOCK: tl.constexpr, LANES: tl.constexpr, WAYS: tl.constexpr):
    """Return the last code that a token can have whose logit is not below the `top_k`-th, and the counts up to it."""
    code, _ = weighted_search(codes, sums, factors, ends, top_k, float("inf"), True, BLOCK, LANES, WAYS)
    limit = code | ID_MASK
    pivots = tl.zeros((WAYS,), tl.int64) + limit
    counts = _counts_up_to(codes, pivots, ends * 0, ends, BLOCK, LANES, WAYS)
    return limit, tl.max(counts, axis=0)


@triton.jit
def _first_passed(weight, total, target, whole, place, SIZE: tl.constexpr):
    """Return the first place with a weight where the total passes the target, or the last one with a weight."""
    passed = (weight > 0) & ((total > target) | (total >= whole))
    last = tl.max(tl.where(weight > 0, place, 0), axis=0)
    return tl.minimum(tl.min(tl.where(passed, place, SIZE), axis=0), last)


@triton.jit
def first_in_id_order(
    penalized, sums, factors, ends, limit, largest, temperature, uniform, vocab_size,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Return the token that `uniform` selects among the candidates up to the code `limit` in the order of their ids."""
    lane, place = tl.arange(0, LANES), tl.arange(0, BLOCK)
    block_sums = tl.load(sums + lane * BLOCK + ends - 1, mask=ends > 0, other=0.0) * factors  # (LANES,)
    totals = tl.cumsum(block_sums, axis=0)
    whole = tl.sum(tl.where(lane == LANES - 1, totals, 0.0), axis=0)
    target = uniform * whole
    block = _first_passed(block_sums, totals, target, whole, lane, LANES)
    before = tl.sum(tl.where(lane == block - 1, totals, 0.0), axis=0)
    token = block * BLOCK + place
    mask = token < vocab_size
    logit = tl.load(penalized + token, mask=mask, other=0.0)
    weight = tl.exp((logit.to(tl.float64) - largest) / temperature)
    weight = tl.where(mask & (code_of(logit, token) <= limit), weight, 0.0)
    chosen = _first_passed(weight, before + tl.cumsum(weight, axis=0), target, whole, place, BLOCK)
    return (block * BLOCK + chosen).to(tl.int64)
