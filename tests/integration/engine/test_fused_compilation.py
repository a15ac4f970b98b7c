"""The fused kernels as machine code for current GPUs, at Llama-2-7B's sizes, which needs no GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# Runs in a separate process, without Triton's interpreter.
COMPILE = r"""
import sys
from tests.support.gpu.kernel_compiler import build
from llama2_server.engine.cuda.fused import attention_kernels, matmul_kernels
from llama2_server.engine.cuda.fused.forward import DEFAULT_TILE
from llama2_server.engine.cuda.matmul import VARIANTS

capability = int(sys.argv[1])
overlaps = capability >= 90

def check(built, loads_before_wait):
    assert built.spilled_bytes == 0, built.spilled_bytes
    weights = [name for name in built.instructions if name.startswith("LDG") and ".EF" in name]
    assert all(name.endswith(".128") for name in weights), weights
    assert weights or not loads_before_wait
    assert overlaps == ("ACQBULK" in built.instructions)
    if overlaps:
        before = built.before("ACQBULK")
        assert sum(name.startswith("LDG") for name in before) == loads_before_wait, before
        assert not any(name.startswith(("ST", "ATOM", "RED")) for name in before), before

# Two tiles where cards differ most, and one elsewhere, because each takes seconds.
for tile in (DEFAULT_TILE, VARIANTS[-1]) if capability in (80, 90) else (DEFAULT_TILE,):
    block = {"BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "PDL": overlaps}
    kernel, first = matmul_kernels._matmul_kernel, 2 * tile.block_n
    check(build(capability, kernel, tile.num_warps, K=4096, HAS_NORM=True, HAS_RESIDUAL=False, **block), first)
    check(build(capability, kernel, tile.num_warps, K=11008, HAS_NORM=False, HAS_RESIDUAL=True, **block), first)
    check(build(capability, matmul_kernels._swiglu_kernel, tile.num_warps, K=4096, **block), first)
attention = build(
    capability, attention_kernels._attention_kernel, 4, KV_HEADS=32, GROUP=1, HEAD_DIM=128, BLOCK=64, BLOCK_GROUP=16,
    BLOCK_DIM=128, ELEMENTS_PER_LINE=64, PREFETCH=True, LANES=128, PDL=overlaps,
)
check(attention, 0)
names = attention.instructions
assert "prefetch.global.L2" in attention.ptx
if overlaps:  # the output projection is requested before the wait
    assert any(name.startswith("CCTL") and "PF2" in name for name in attention.before("ACQBULK")), names
# A partial result is visible to the other programs before it is announced, and theirs are not read from an old cache.
announced = next(index for index, name in enumerate(names) if name.startswith("ATOMG"))
assert any(name.startswith("MEMBAR") for name in names[:announced]), names
assert any(name.startswith("BAR.SYNC") for name in names[:announced]), names
assert any(name.startswith("CCTL.IVALL") for name in names[announced:]), names
# Keys and values are read 16 bytes at a time.
keys = [name for name in names if name.startswith("LDGSTS")]
assert keys and all(name.endswith(".128") for name in keys), keys
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="NOT TESTED: the Triton kernels; triton is not installed")
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
@pytest.mark.timeout(600)  # on a busy machine
def test_fused_kernels_compile(capability: int, tmp_path: Path) -> None:
    """A100, RTX 40 and L4, H100 and H200, B200: no spills, 16-byte loads, weights requested before the wait.

    Nothing is written before the wait.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
