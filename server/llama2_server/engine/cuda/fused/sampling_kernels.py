"""Two Triton kernels that sample a step: the first sorts blocks of the vocabulary, the second draws from all of them.

They follow the rules of the reference sampler, `engine/sampling.py`. A token's code is a number whose order is the
order of the candidates: largest logit first, equal ones by id. In the sorted blocks, the sum of the weights up to any
code is a binary search and one sum per block. So the last token of the nucleus and the drawn one are found by comparing
sums, and no list of the whole vocabulary is sorted. Sums are in float64 and in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama2_server.engine.cuda.fused.search_kernels import (
    ID_MASK,
    LAST_CODE,
    code_of,
    first_in_id_order,
    logit_of,
    rank_limit,
    sum_up_to,
    weighted_search,
)
from llama2_server.engine.cuda.sampling import NO_TOKEN
from llama2_server.engine.cuda.step_runner import (
    COLUMNS,
    FREQUENCY,
    PRESENCE,
    REPETITION,
    SLOT,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    UNIFORM,
    SamplingState,
)

BLOCK_TOKENS = 256
PART_TOKENS = 8  # tokens that the tokens of a block are compared with at once
WAYS = 32  # codes that one step of the search compares
SORT_WARPS, DRAW_WARPS = 8, 16  # with 4, or with 8 and 16 ways, registers are spilled
MAX_VOCAB_SIZE = 2**20
NOT_FINITE = tl.constexpr(-(2**62))
"""The first code of a block with a logit that is not finite."""


@triton.jit
def _penalized(
    logits, table, seen, counts, row, token, vocab_size,
    COLUMNS: tl.constexpr, SLOT: tl.constexpr,
    REPETITION: tl.constexpr, FREQUENCY: tl.constexpr, PRESENCE: tl.constexpr,
):  # fmt: skip
    """Return the logits of tokens with the penalties of a row, each operation rounded as in torch."""
    mask = token < vocab_size
    logit = tl.load(logits + row * vocab_size + token, mask=mask, other=0.0)
    row_table = table + row * COLUMNS
    repetition = tl.load(row_table + REPETITION).to(tl.float32)
    frequency = tl.load(row_table + FREQUENCY)
    presence = tl.load(row_table + PRESENCE)
    if (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0):
        at = tl.load(row_table + SLOT).to(tl.int64) * vocab_size + token
        # Keskar et al. 2019 (CTRL), with transformers' correction for negative logits.
        scaled = tl.where(logit < 0, logit * repetition, tl.div_rn(logit, repetition + tl.zeros_like(logit)))
        logit = tl.where(tl.load(seen + at, mask=mask, other=0) != 0, scaled, logit)
        count = tl.load(counts + at, mask=mask, other=0.0).to(tl.float64)
        logit -= (count * frequency + tl.where(count > 0, presence, 0.0)).to(tl.float32)
    return logit


@triton.jit
def _up_to_each(
    logits, table, seen, counts, row, block, code, largest, temperature, vocab_size,
    COLUMNS: tl.constexpr, SLOT: tl.constexpr,
    REPETITION: tl.constexpr, FREQUENCY: tl.constexpr, PRESENCE: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Return for each token of a block how many codes are not after its own, and the sum of their weights.

    So no rounding makes a sum smaller than an earlier one, and a token without a weight has the sum of the one before.
    """
    count = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, BLOCK, PART):
        other = block * BLOCK + start + tl.arange(0, PART)
        logit = _penalized(
            logits, table, seen, counts, row, other, vocab_size, COLUMNS, SLOT, REPETITION, FREQUENCY, PRESENCE
        )
        weight = tl.exp((logit.to(tl.float64) - largest) / temperature)
        in_order = (code_of(logit, other)[None, :] <= code[:, None]) & (other < vocab_size)[None, :]
        count += tl.sum(in_order.to(tl.int32), axis=1)
        total += tl.sum(tl.where(in_order, weight[None, :], 0.0), axis=1)
    return count, total


@triton.jit
def _sort_kernel(
    logits,  # (rows, vocab_size) float32
    table,  # (rows, COLUMNS) float64
    seen, counts,  # (slots, vocab_size) int8 and float32
    penalized,  # (rows, vocab_size) float32
    firsts,  # (rows, blocks) int64: the first code of each block
    codes, sums,  # (rows, blocks, BLOCK) int64 and float64: the sorted codes, and the sums of their weights
    vocab_size,
    COLUMNS: tl.constexpr, SLOT: tl.constexpr, TEMPERATURE: tl.constexpr,
    REPETITION: tl.constexpr, FREQUENCY: tl.constexpr, PRESENCE: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr, GREEDY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Apply the penalties to one block of a row's tokens, sort them, and sum their weights relative to the first."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    mask = token < vocab_size
    if GREEDY:
        logit = tl.load(logits + row * vocab_size + token, mask=mask, other=0.0)
    else:
        logit = _penalized(
            logits, table, seen, counts, row, token, vocab_size, COLUMNS, SLOT, REPETITION, FREQUENCY, PRESENCE
        )
    code = tl.where(mask, code_of(logit, token), LAST_CODE)
    broken = tl.max((mask & ~(tl.abs(logit) < float("inf"))).to(tl.int32), axis=0)
    first = tl.min(code, axis=0)
    index = row * tl.num_programs(1) + block
    tl.store(firsts + index, tl.where(broken != 0, NOT_FINITE, first))
    if not GREEDY:
        temperature = tl.load(table + row * COLUMNS + TEMPERATURE)
        if temperature > 0:
            tl.store(penalized + row * vocab_size + token, logit, mask=mask)
            largest = logit_of(first).to(tl.float64)
            count, total = _up_to_each(
                logits, table, seen, counts, row, block, code, largest, temperature, vocab_size,
                COLUMNS, SLOT, REPETITION, FREQUENCY, PRESENCE, BLOCK, PART,
            )  # fmt: skip
            place = index * BLOCK + count - 1
            tl.store(codes + place, code, mask=mask)
            tl.store(sums + place, total, mask=mask)


@triton.jit
def _drawn(
    row_table, penalized, first, smallest, codes, sums, vocab_size, blocks,
    TEMPERATURE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, UNIFORM: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """Return the token of a row with a temperature above zero; `first` are the first codes of its blocks."""
    temperature, uniform = tl.load(row_table + TEMPERATURE), tl.load(row_table + UNIFORM)
    top_k, top_p = tl.load(row_table + TOP_K), tl.load(row_table + TOP_P)
    lane = tl.arange(0, LANES)
    largest = logit_of(smallest).to(tl.float64)
    factors = tl.exp((logit_of(first).to(tl.float64) - largest) / temperature)
    factors = tl.where(lane < blocks, factors, 0.0)
    ends = tl.maximum(tl.minimum(vocab_size - lane * BLOCK, BLOCK), 0)  # (LANES,): candidates of each block
    limit = smallest * 0 + LAST_CODE
    if (top_k > 0) & (top_k < vocab_size):
        limit, ends = rank_limit(codes, sums, factors, ends, top_k, BLOCK, LANES, WAYS)
    if top_p < 1.0:
        total = sum_up_to(sums, factors, ends, BLOCK, LANES, WAYS)
        code, ends = weighted_search(
            codes, sums, factors, ends, top_p * total, float("inf"), False, BLOCK, LANES, WAYS
        )  # fmt: skip
        total = sum_up_to(sums, factors, ends, BLOCK, LANES, WAYS)
        # The product can be rounded up to the whole sum: then the last weight that changes the sum is drawn.
        code, ends = weighted_search(codes, sums, factors, ends, total, uniform * total, False, BLOCK, LANES, WAYS)
        token = code & ID_MASK
    else:
        token = first_in_id_order(
            penalized, sums, factors, ends, limit, largest, temperature, uniform, vocab_size, BLOCK, LANES
        )
    return token


@triton.jit
def _draw_kernel(
    table,  # (rows, COLUMNS) float64
    penalized, firsts, codes, sums,  # from the kernel before
    seen, counts,  # (slots, vocab_size) int8 and float32
    last_ids,  # (slots,) int64
    token_ids,  # (rows,) int64
    vocab_size, blocks,
    COLUMNS: tl.constexpr, SLOT: tl.constexpr, TEMPERATURE: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, UNIFORM: tl.constexpr, NO_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, WAYS: tl.constexpr, GREEDY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Draw the token of one row, and store it as the result, as the next step's input and for the penalties."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    row_table = table + row * COLUMNS
    slot = tl.load(row_table + SLOT).to(tl.int64)
    first = tl.load(firsts + row * blocks + lane, mask=lane < blocks, other=LAST_CODE)
    smallest = tl.min(first, axis=0)
    token = smallest & ID_MASK
    if smallest == NOT_FINITE:
        token = smallest * 0 + NO_TOKEN
    if not GREEDY:  # noqa: SIM102 - the kernel is compiled with or without it
        if (smallest != NOT_FINITE) & (tl.load(row_table + TEMPERATURE) > 0):
            start = row * blocks * BLOCK
            token = _drawn(
                row_table, penalized + row * vocab_size, first, smallest, codes + start, sums + start, vocab_size,
                blocks, TEMPERATURE, TOP_K, TOP_P, UNIFORM, BLOCK, LANES, WAYS,
            )  # fmt: skip
    tl.store(token_ids + row, token)
    token = tl.maximum(token, 0)  # a row without a token ends, but its next step may be in progress
    tl.store(last_ids + slot, token)
    if not GREEDY:
        at = slot * vocab_size + token
        tl.store(seen + at, 1)
        tl.store(counts + at, tl.load(counts + at) + 1.0)


class FusedSampler:
    """Samples the rows of a step in two kernels; equals `cuda/sampling.py`.

    Args:
        rows: the largest number of rows of a step.
        options: from `launch_options`.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device, options: dict[str, Any]) -> None:
        if vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f"a vocabulary of {vocab_size} tokens is larger than {MAX_VOCAB_SIZE}")
        self._blocks = triton.cdiv(vocab_size, BLOCK_TOKENS)
        size = (rows, self._blocks, BLOCK_TOKENS)
        self._penalized = torch.empty((rows, vocab_size), dtype=torch.float32, device=device)
        self._firsts = torch.empty(size[:2], dtype=torch.int64, device=device)
        self._codes = torch.empty(size, dtype=torch.int64, device=device)
        self._sums = torch.empty(size, dtype=torch.float64, device=device)
        # Without fusion, products are rounded before they are added, as in torch.
        self._options = {"enable_fp_fusion": False} | options

    def __call__(self, logits: Tensor, table: Tensor, state: SamplingState, argmax_only: bool) -> None:
        """Sample one token per row of float32 logits, (rows, vocab_size), and store it in the state.

        `cuda/step_runner.py` defines the columns of the table, (rows, COLUMNS).
        """
        rows, vocab_size = logits.shape
        seen, counts = state.penalties.seen.view(torch.int8), state.penalties.counts
        columns = {"COLUMNS": COLUMNS, "SLOT": SLOT, "TEMPERATURE": TEMPERATURE}
        options = columns | self._options | {"GREEDY": argmax_only, "BLOCK": BLOCK_TOKENS}
        _sort_kernel[(rows, self._blocks)](
            logits, table, seen, counts, self._penalized, self._firsts, self._codes, self._sums, vocab_size,
            REPETITION=REPETITION, FREQUENCY=FREQUENCY, PRESENCE=PRESENCE,
            PART=PART_TOKENS, num_warps=SORT_WARPS, **options,
        )  # fmt: skip
        _draw_kernel[(rows,)](
            table, self._penalized, self._firsts, self._codes, self._sums, seen, counts,
            state.last_ids, state.token_ids, vocab_size, self._blocks,
            TOP_K=TOP_K, TOP_P=TOP_P, UNIFORM=UNIFORM, NO_TOKEN=NO_TOKEN,
            LANES=triton.next_power_of_2(self._blocks), WAYS=WAYS, num_warps=DRAW_WARPS, **options,
        )  # fmt: skip
