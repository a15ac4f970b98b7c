"""Tests of the fused kernels against plain torch and the kernels that they replace."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.gpu.tensors import HEADS, RandomTensors, assert_near
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@pytest.fixture(scope="module")
def kernels(device: torch.device) -> Any:
    """The kernel modules in one namespace; imported late, because they need Triton."""
    from llama2_server.engine.cuda import attention_kernels, matmul_kernels
    from llama2_server.engine.cuda.fused import attention_kernels as fused_attention
    from llama2_server.engine.cuda.fused import launch
    from llama2_server.engine.cuda.fused import matmul_kernels as fused

    return SimpleNamespace(
        attention=fused_attention, attention_parts=attention_kernels, launch=launch, fused=fused, plain=matmul_kernels
    )


# A width of 100 is no multiple of 16, as the widths of a Llama model are. Triton knows that it is one of 4 only if it
# is a constant, as in the fused kernels, so a card adds up the elements in another order.
@pytest.mark.parametrize("shape", [(8, 128), (9, 112), (4, 17), (5, 304), (9, 100)], ids=str)
def test_fused_matmuls_equal_the_plain_ones(
    kernels: Any, random: RandomTensors, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """The bits are the same with the same tile; sizes that do not fill a tile or have fewer than three are included."""
    n, k = shape
    x, weight, norm, residual, both = random(1, k), random(n, k), random(k), random(1, n), random(2 * n, k)
    equal = assert_near if k == 100 and x.device.type == "cuda" else assert_same_bits
    config, options = kernels.plain.TileConfig(4, 64, 4), kernels.launch.launch_options(x.device)
    normed = {"norm": norm, "epsilon": 1e-5}
    for arguments in ({}, {"residual": residual}, normed, normed | {"dtype": torch.float32}):
        expected = kernels.plain.matmul(x, weight, **arguments, config=config)
        equal(kernels.fused.matmul(x, weight, **arguments, config=config, options=options), expected, dtype)
    expected = kernels.plain.swiglu(x, both, **normed, config=config)
    equal(kernels.fused.swiglu(x, both, **normed, config=config, options=options), expected, dtype)


def assert_same_bits(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert torch.equal(found, expected), dtype


def rotary_table(random: RandomTensors, context: int, head_dim: int) -> tuple[Tensor, Tensor]:
    cosines, sines = (random(context, head_dim // 2).repeat(1, 2) for _ in range(2))
    sines[:, : head_dim // 2] *= -1
    return cosines, sines


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_attention_in_one_kernel(
    kernels: Any,
    random: RandomTensors,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first token, ends of blocks and splits, a full slot, and a padding row; twice with the same buffers.

    Everything after a row's position is not a number, and so is what the buffers hold at first.
    """
    from llama2_server.engine.model.llama import _rotate

    count, kv_count, head_dim = heads
    monkeypatch.setattr(kernels.attention_parts, "PROGRAMS_PER_ROW", 4 * kv_count)  # four splits
    context = 5 * kernels.attention.BLOCK_TOKENS + 10
    positions = [0, 64, 65, 4 * 64, context - 1, -1]
    slots = [5, 1, 0, 2, 3, 9]
    rows, table = len(positions), rotary_table(random, context, head_dim)
    keys, values = random(6, kv_count, context, head_dim), random(6, kv_count, context, head_dim)
    for row, position in enumerate(positions[:-1]):
        keys[slots[row], :, position:] = values[slots[row], :, position:] = float("nan")
    qkv, next_weight = random(rows, (count + 2 * kv_count) * head_dim), random(40, 40)
    attention = kernels.attention.Attention(rows, count, keys, kernels.launch.launch_options(qkv.device))
    attention._partials.fill_(float("nan"))
    attention._statistics.fill_(float("nan"))
    numbers = [torch.tensor(values, device=qkv.device) for values in (slots, positions)]
    results = [attention(qkv, table, *numbers, keys, values, next_weight) for _ in range(2)]
    assert torch.equal(*results)
    assert not attention._arrived.any()
    # Splits that have stored a part, by the lengths of the rows; one split stores its result at once.
    assert (~attention._statistics[:, 0, :, 0, 0].isnan()).sum(dim=1).tolist() == [0, 0, 2, 4, 3, 0]
    parts = qkv.view(rows, -1, head_dim).double()
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        if position < 0:
            assert not results[0][row].any()
            continue
        cosine, sine = (half[position].double() for half in table)
        rotated = _rotate(parts[row : row + 1, : count + kv_count], cosine, sine)[0].to(dtype)
        assert_near(keys[slot, :, position], rotated[count:], dtype)
        assert torch.equal(values[slot, :, position], parts[row, count + kv_count :].to(dtype))
        assert keys[slot, :, position + 1 :].isnan().all()
        key, value = (cache[slot : slot + 1, :, : position + 1].double() for cache in (keys, values))
        query = rotated[:count].view(1, count, 1, head_dim).double()
        expected = scaled_dot_product_attention(query, key, value, enable_gqa=True).flatten()
        assert_near(results[0][row], expected, dtype)
