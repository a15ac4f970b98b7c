"""The fused kernels as machine code for current GPUs, at Llama-2-7B's sizes, which needs no GPU."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from tests.support.gpu.compilation import CAPABILITIES, Compilations, compilations

# Runs in a separate process, without Triton's interpreter.
COMPILE = r"""
import re
import sys
from tests.support.gpu import matmuls
from tests.support.gpu.kernel_compiler import build
from llama2_server.engine.cuda.fused import attention_kernels, embedding_kernels, matmul_kernels, sampling_kernels
from llama2_server.engine.cuda.fused.forward import DEFAULT_TILE
from llama2_server.engine.cuda.sampling import NO_TOKEN
from llama2_server.engine.cuda import step_runner

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
        assert not any(name.startswith(("ST", "ATOM", "RED", "EXIT")) for name in before), before

# Every tile: no spills, 16-byte loads, and in the code before the wait only the first weights are requested.
for tile, matmul in matmuls.tiled():
    kernel = matmul_kernels._swiglu_kernel if matmul.swiglu else matmul_kernels._matmul_kernel
    constants = matmul.constants(tile) | {"K": matmul.summands, "PDL": overlaps}
    # Reading machine code takes seconds.
    sass = tile == DEFAULT_TILE and not matmul.float_out
    registers = matmul_kernels.SWIGLU_REGISTERS if matmul.swiglu else matmul_kernels.MATMUL_REGISTERS
    options = {"sass": sass, "registers": registers.get(tile.block_n), "float_out": matmul.float_out}
    built = build(capability, kernel, tile.num_warps, **options, **constants)
    assert built.spilled_bytes == 0, (tile, matmul, built.spilled_bytes)
    loads = re.findall(r"ld\.global\S*evict_first\S*", built.ptx)
    assert loads and all(".v4." in load for load in loads), loads
    if overlaps:
        before = built.ptx.partition("griddepcontrol.wait")[0]
        assert len(re.findall(r"ld\.global\S*evict_first\S*", before)) == 2 * tile.block_n, before
        assert before.count("ld.global") == 2 * tile.block_n and "st.global" not in before, before
    if sass:
        check(built, 2 * tile.block_n)
attention = build(
    capability, attention_kernels._attention_kernel, 4, KV_HEADS=32, GROUP=1, HEAD_DIM=128, BLOCK=64, BLOCK_GROUP=16,
    BLOCK_DIM=128, ELEMENTS_PER_LINE=64, PREFETCH=True, LANES=128, PDL=overlaps, sass=True,
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

# Embedding and sampling: 16-byte copies, and nothing is read or written before the wait.
columns = {name: getattr(step_runner, name) for name in ("COLUMNS", "SLOT", "TEMPERATURE")}
start = build(
    capability, embedding_kernels._embedding_kernel, 4, COLUMNS=columns["COLUMNS"], SLOT=columns["SLOT"],
    POSITION=step_runner.POSITION, BLOCK=embedding_kernels.BLOCK, PDL=overlaps, sass=True,
)
check(start, 0)
assert "LDG.E.128" in start.instructions and "STG.E.128" in start.instructions, start.instructions
penalties = {name: getattr(step_runner, name) for name in ("REPETITION", "FREQUENCY", "PRESENCE")}
shares = {name: getattr(step_runner, name) for name in ("TOP_K", "TOP_P", "UNIFORM")}
for greedy in (True, False):
    options = columns | {"BLOCK": sampling_kernels.BLOCK_TOKENS, "GREEDY": greedy, "PDL": overlaps, "sass": True}
    sizes = {"LANES": 128, "WAYS": sampling_kernels.WAYS, "NO_TOKEN": NO_TOKEN}
    part, warps = sampling_kernels.PART_TOKENS, sampling_kernels.SORT_WARPS
    check(build(capability, sampling_kernels._sort_kernel, warps, PART=part, **penalties, **options), 0)
    warps = sampling_kernels.DRAW_WARPS
    check(build(capability, sampling_kernels._draw_kernel, warps, **shares, **sizes, **options), 0)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compilations]:
    """The programs, which run in parallel."""
    with compilations(COMPILE, tmp_path_factory.mktemp("triton")) as running:
        yield running


@pytest.mark.skipif(find_spec("triton") is None, reason="NOT TESTED: the Triton kernels; triton is not installed")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.timeout(600)  # on a busy machine
def test_fused_kernels_compile(capability: int, compiled: Compilations) -> None:
    """With each tile: no spills, 16-byte loads, weights requested before the wait, and nothing written before it."""
    compiled.check(capability)
