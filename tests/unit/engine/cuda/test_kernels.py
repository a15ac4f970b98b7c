"""Tests of each kernel against plain torch, on a GPU if available, otherwise in Triton's interpreter."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.gpu.tensors import HEADS, RandomTensors, assert_near
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

EPSILON = 1e-5


@pytest.fixture(scope="module")
def kernels(device: torch.device) -> Any:
    """Both kernel modules in one namespace; imported late, because they need Triton."""
    from llama2_server.engine.cuda import attention_kernels, matmul_kernels

    return SimpleNamespace(**(vars(attention_kernels) | vars(matmul_kernels)))


@pytest.mark.parametrize("shape", [(64, 128), (33, 100), (8, 17)], ids=str)
@pytest.mark.parametrize("block", [(4, 32), (16, 64)], ids=str)
def test_matmul(
    kernels: Any, random: RandomTensors, dtype: torch.dtype, shape: tuple[int, int], block: tuple[int, int]
) -> None:
    """One row times a weight, with and without norm and residual, including sizes that do not fill a block."""
    n, k = shape
    x, weight, norm, residual = random(1, k), random(n, k), random(k), random(1, n)
    config = kernels.TileConfig(*block, num_warps=4)
    normalized = rms_norm(x.double(), (k,), norm.double(), EPSILON)
    plain = linear(x.double(), weight.double())
    assert_near(kernels.matmul(x, weight, config=config), plain, dtype)
    assert_near(kernels.matmul(x, weight, residual=residual, config=config), plain + residual.double(), dtype)
    found = kernels.matmul(x, weight, norm=norm, epsilon=EPSILON, dtype=torch.float32, config=config)
    assert found.dtype == torch.float32
    assert_near(found, linear(normalized, weight.double()), dtype)


@pytest.mark.parametrize("shape", [(64, 128), (33, 100)], ids=str)
def test_swiglu(kernels: Any, random: RandomTensors, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """The first half of SwiGLU, from one matrix that holds the rows of gate and of up."""
    n, k = shape
    x, weight, norm = random(1, k), random(2 * n, k), random(k)
    normalized = rms_norm(x.double(), (k,), norm.double(), EPSILON)
    gate, up = linear(normalized, weight.double()).chunk(2, dim=1)
    found = kernels.swiglu(x, weight, norm=norm, epsilon=EPSILON, config=kernels.TileConfig(8, 64, num_warps=4))
    assert_near(found, silu(gate) * up, dtype)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_rotate_and_store(kernels: Any, random: RandomTensors, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    """Queries and keys are rotated as in plain torch; keys and values are written to their slots only."""
    from llama2_server.engine.model.llama import _rotate

    count, kv_count, head_dim = heads
    context, slots, positions = 20, [2, 0, 3], [7, 0, -1]
    qkv = random(3, (count + 2 * kv_count) * head_dim)
    cosines, sines = (random(context, head_dim // 2).repeat(1, 2) for _ in range(2))
    sines[:, : head_dim // 2] *= -1
    keys, values = random(3, kv_count, context, head_dim), random(3, kv_count, context, head_dim)
    expected_keys, expected_values = keys.clone(), values.clone()
    parts = qkv.view(3, -1, head_dim).double()
    table = [rotary[positions].unsqueeze(1).double() for rotary in (cosines, sines)]
    rotated = _rotate(parts[:, : count + kv_count], *table)
    for row in range(2):  # the third row is padding
        expected_keys[slots[row], :, positions[row]] = rotated[row, count:].to(dtype)
        expected_values[slots[row], :, positions[row]] = parts[row, count + kv_count :].to(dtype)
    rows = (torch.tensor(slots, device=qkv.device), torch.tensor(positions, device=qkv.device))
    queries = kernels.rotate_and_store(qkv, (cosines, sines), *rows, keys, values)
    assert_near(queries[:2], rotated[:2, :count], dtype)
    assert_near(keys, expected_keys, dtype)
    assert torch.equal(values, expected_values)


def attention_kernels() -> Any:
    """Return the module, which needs Triton."""
    from llama2_server.engine.cuda import attention_kernels

    return attention_kernels


def test_a_row_has_as_many_splits_as_fill_a_card(kernels: Any) -> None:
    """7B has 8 splits of 32 heads, a model with 8 key heads has 32, and no split is shorter than a block."""
    assert [kernels.split_count(*sizes) for sizes in ((32, 3072), (8, 4096), (40, 3072), (2, 64))] == [8, 32, 8, 1]


def test_splits_follow_the_length(kernels: Any, device: torch.device) -> None:
    """A short row has few splits, and a longer one has all of them: each split has as many blocks as any other."""
    block, splits, head_dim = kernels.BLOCK_TOKENS, 4, 16
    tokens = [1, block + 1, 4 * block, 5 * block, 8 * block]
    rows, context = len(tokens), 8 * block
    queries = torch.zeros(rows, 1, head_dim, device=device)
    keys = torch.zeros(1, 1, context, head_dim, device=device)
    slots = torch.zeros(rows, dtype=torch.int64, device=device)
    partials = torch.zeros(rows, 1, splits, head_dim, device=device)
    log_sum_exps = torch.zeros(rows, 1, splits, device=device)
    kernels._split_attention_kernel[(rows, 1, splits)](
        queries, keys, keys, slots, torch.tensor(tokens, device=device) - 1,
        partials, log_sum_exps, 1, 1, context, head_dim, 1.0,
        BLOCK=block, GROUP=1, BLOCK_GROUP=16, BLOCK_DIM=16, num_warps=4,
    )  # fmt: skip
    # Each score is 0, so that the exponential of this number is the number of tokens of a split.
    lengths = [[float(length) for length in row] for row in log_sum_exps[:, 0].exp().round().tolist()]
    one, two = float(block), 2.0 * block
    assert lengths == [[1, 0, 0, 0], [one, 1, 0, 0], [one] * 4, [two, two, one, 0], [two] * 4]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_attend(
    kernels: Any,
    random: RandomTensors,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attention over a slot's tokens: the first token, ends of blocks and splits, a full slot, and a padding row.

    Keys and values after a row's position are not numbers, and change nothing.
    """
    count, kv_count, head_dim = heads
    monkeypatch.setattr(attention_kernels(), "PROGRAMS_PER_ROW", 4 * kv_count)  # four splits
    block = kernels.BLOCK_TOKENS
    context = 5 * block + 10
    positions = [0, block - 1, block, 2 * block + 5, 4 * block - 1, 4 * block, context - 1, -1]
    slots = [3, 1, 0, 2, 3, 1, 0, len(positions)]
    queries = random(len(positions), count, head_dim)
    keys, values = random(4, kv_count, context, head_dim), random(4, kv_count, context, head_dim)
    for row, slot in enumerate(slots[:2]):
        keys[slot, :, positions[row] + 1 :] = values[slot, :, positions[row] + 1 :] = float("nan")
    slots[5:6] = [2]  # slots 3 and 1 end early
    slots[4:5] = [0]
    rows = (torch.tensor(slots, device=queries.device), torch.tensor(positions, device=queries.device))
    found = kernels.attend(queries, *rows, keys, values)
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        if position < 0:
            assert not found[row].any()
            continue
        key, value = (cache[slot : slot + 1, :, : position + 1].double() for cache in (keys, values))
        query = queries[row].view(1, count, 1, head_dim).double()
        expected = scaled_dot_product_attention(query, key, value, enable_gqa=True).flatten()
        assert_near(found[row], expected, dtype)
