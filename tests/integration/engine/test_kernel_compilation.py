"""Compilation of every Triton kernel of a step to machine code for current GPUs, which needs no GPU."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from tests.support.gpu.compilation import CAPABILITIES, Compilations, compilations

# Runs in a separate process, without Triton's interpreter. The types and sizes are Llama-2-7B's.
COMPILE = r"""
import re
import sys
from tests.support.gpu import kernel_compiler, matmuls
from llama2_server.engine.cuda import attention_kernels, matmul_kernels

capability = int(sys.argv[1])

def build(kernel, warps, **constants):
    built = kernel_compiler.build(capability, kernel, warps, **constants)
    assert built.spilled_bytes == 0, (kernel, constants, built.spilled_bytes)
    return built.ptx

def check_loop(ptx, loads):
    # The loop over a weight reads 16 bytes at a time, and contains no barrier.
    loops = [found[1] for found in re.findall(r"^(\$L__BB0_\d+):(.*?)bra\s+\1;", ptx, re.MULTILINE | re.DOTALL)]
    assert len(loops) == 1, ptx
    assert "bar.sync" not in loops[0], loops[0]
    assert len(re.findall(r"ld\.global\S*evict_first\S*v4", loops[0])) == loads, loops[0]

for tile, matmul in matmuls.tiled():
    kernel = matmul_kernels._swiglu_kernel if matmul.swiglu else matmul_kernels._matmul_kernel
    constants = matmul.constants(tile) | {"EVEN_K": matmul.summands % tile.block_k == 0}
    registers = matmul_kernels.SWIGLU_REGISTERS if matmul.swiglu else matmul_kernels.MATMUL_REGISTERS
    ptx = build(kernel, tile.num_warps, registers=registers.get(tile.block_n), float_out=matmul.float_out, **constants)
    check_loop(ptx, tile.block_n * (2 if matmul.swiglu else 1))
build(attention_kernels._rotate_and_store_kernel, 1, BLOCK_HALF=64)
split = {"BLOCK": attention_kernels.BLOCK_TOKENS}
build(attention_kernels._split_attention_kernel, 4, **split, GROUP=1, BLOCK_GROUP=16, BLOCK_DIM=128)
build(attention_kernels._split_attention_kernel, 4, **split, GROUP=8, BLOCK_GROUP=16, BLOCK_DIM=128)
build(attention_kernels._combine_kernel, 4, BLOCK_SPLITS=8, BLOCK_DIM=128)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compilations]:
    """The programs, which run in parallel."""
    with compilations(COMPILE, tmp_path_factory.mktemp("triton")) as running:
        yield running


@pytest.mark.skipif(find_spec("triton") is None, reason="NOT TESTED: the Triton kernels; triton is not installed")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.timeout(600)  # on a busy machine
def test_kernels_compile(capability: int, compiled: Compilations) -> None:
    """With each tile: no spills, and the loop over a weight reads 16 bytes at a time."""
    compiled.check(capability)
