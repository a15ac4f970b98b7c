"""The kernels of one layer at Llama-2-7B's widths: as many summands and heads as there, but few rows of each weight."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.gpu.tensors import RandomTensors, assert_near
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM = 4096, 11008, 32, 128
ROWS = 9  # of a weight, which do not fill the last tile
EPSILON = 1e-5


@pytest.fixture
def random(device: torch.device) -> RandomTensors:
    """Random float16 tensors on the device."""
    return RandomTensors(device, torch.float16)


@pytest.fixture
def kernels(device: torch.device) -> Any:
    """The kernel modules in one namespace; imported late, because they need Triton."""
    from llama2_server.engine.cuda import attention_kernels, matmul, matmul_kernels
    from llama2_server.engine.cuda.fused import attention_kernels as fused_attention
    from llama2_server.engine.cuda.fused import launch
    from llama2_server.engine.cuda.fused import matmul_kernels as fused

    return SimpleNamespace(
        plain=matmul_kernels, fused=fused, attention=fused_attention, parts=attention_kernels, matmul=matmul,
        options=launch.launch_options(device),
    )  # fmt: skip


def test_matmuls(kernels: Any, random: RandomTensors) -> None:
    """Of 4,096 and of 11,008 summands, with the tiles that autotuning tries last; fused ones give the same bits."""
    config, options = kernels.matmul.VARIANTS[-1], kernels.options
    x, inner, norm, residual = random(1, HIDDEN), random(1, INTERMEDIATE), random(HIDDEN), random(1, ROWS)
    square, both, down = random(ROWS, HIDDEN), random(2 * ROWS, HIDDEN), random(ROWS, INTERMEDIATE)
    both /= HIDDEN**0.5  # as in a model, where gates are near 1
    normed = {"norm": norm, "epsilon": EPSILON}
    normalized = rms_norm(x.double(), (HIDDEN,), norm.double(), EPSILON)
    gate, up = linear(normalized, both.double()).chunk(2, dim=1)
    expected = [
        linear(normalized, square.double()),
        residual.double() + linear(inner.double(), down.double()),
        silu(gate) * up,
    ]
    found = [
        [
            module.matmul(x, square, **normed, config=config, **more),
            module.matmul(inner, down, residual=residual, config=config, **more),
            module.swiglu(x, both, **normed, config=config, **more),
        ]
        for module, more in ((kernels.plain, {}), (kernels.fused, {"options": options}))
    ]
    for plain, fused, exact in zip(*found, expected, strict=True):
        assert_near(plain, exact, torch.float16)
        assert torch.equal(plain, fused)


@pytest.mark.parametrize("position", [0, 131])
@pytest.mark.timeout(300)  # the interpreter on a busy machine
def test_attention(kernels: Any, random: RandomTensors, position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 32 heads, at the first token and at an odd length; everything after the position is not a number."""
    from llama2_server.engine.model.llama import _rotate

    monkeypatch.setattr(kernels.parts, "PROGRAMS_PER_ROW", 2 * HEADS)  # two splits
    context = 150
    keys, values = random(1, HEADS, context, HEAD_DIM), random(1, HEADS, context, HEAD_DIM)
    keys[:, :, position:] = values[:, :, position:] = float("nan")
    cosines, sines = (random(context, HEAD_DIM // 2).repeat(1, 2) for _ in range(2))
    sines[:, : HEAD_DIM // 2] *= -1
    qkv = random(1, 3 * HEADS * HEAD_DIM)
    numbers = [torch.tensor([number], device=qkv.device) for number in (0, position)]
    attention = kernels.attention.Attention(1, HEADS, keys, kernels.options)
    fused_keys, fused_values = keys.clone(), values.clone()
    found = attention(qkv, (cosines, sines), *numbers, fused_keys, fused_values, random(40, 40))
    queries = kernels.parts.rotate_and_store(qkv, (cosines, sines), *numbers, keys, values)
    in_parts = kernels.parts.attend(queries, *numbers, keys, values)
    parts = qkv.view(3 * HEADS, HEAD_DIM).double()
    rotated = _rotate(parts[None, : 2 * HEADS], cosines[position].double(), sines[position].double())[0].half()
    assert_near(fused_keys[0, :, position], rotated[HEADS:], torch.float16)
    assert torch.equal(fused_keys[0, :, : position + 1], keys[0, :, : position + 1])
    assert torch.equal(fused_values[0, :, : position + 1], values[0, :, : position + 1])
    assert fused_keys[:, :, position + 1 :].isnan().all()
    key, value = (cache[:, :, : position + 1].double() for cache in (keys, values))
    query = rotated[:HEADS].view(1, HEADS, 1, HEAD_DIM).double()
    expected = scaled_dot_product_attention(query, key, value).flatten()
    assert_near(found[0], expected, torch.float16)
    assert_near(in_parts[0], expected, torch.float16)
