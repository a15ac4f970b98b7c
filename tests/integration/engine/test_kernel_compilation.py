"""Compilation of every Triton kernel to machine code for current GPUs, which needs no GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# Runs in a separate process, without Triton's interpreter. The types and sizes are Llama-2-7B's.
COMPILE = r"""
import re
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from llama2_server.engine.cuda import attention_kernels, matmul_kernels
from llama2_server.engine.cuda.matmul import VARIANTS

HALF, FLOAT, NUMBERS = "*fp16", "*fp32", "*i64"
KINDS = {"partials": FLOAT, "log_sum_exps": FLOAT, "slots": NUMBERS, "positions": NUMBERS}
KINDS |= {"epsilon": "fp32", "factor": "fp32"}
COUNTS = ("N", "K", "heads", "kv_heads", "context_length", "half", "head_dim", "splits")

def build(kernel, warps, **constants):
    names = kernel.arg_names
    types = {name: KINDS.get(name, "i32" if name in COUNTS else HALF) for name in names}
    types |= dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    # At Llama-2-7B's sizes, addresses and sizes are multiples of 16.
    even = [index for index, name in enumerate(names) if types[name] not in ("constexpr", "fp32")]
    source = ASTSource(kernel, types, constexprs=values, attrs={(index,): [["tt.divisibility", 16]] for index in even})
    built = compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": warps})
    assert built.asm["cubin"]
    # The shared memory of a block on every GPU since Ampere.
    assert built.metadata.shared <= 99 * 1024, (kernel, built.metadata.shared)
    return built.asm["ptx"]

def check_loop(ptx, loads):
    # The loop over a weight reads 16 bytes at a time, and contains no barrier.
    loops = [found[1] for found in re.findall(r"^(\$L__BB0_\d+):(.*?)bra\s+\1;", ptx, re.MULTILINE | re.DOTALL)]
    assert len(loops) == 1, ptx
    assert "bar.sync" not in loops[0], loops[0]
    assert len(re.findall(r"ld\.global\S*evict_first\S*v4", loops[0])) == loads, loops[0]

for tile in filter(None, VARIANTS):
    block = {"EVEN_K": True, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    for fused in ({"HAS_NORM": True, "HAS_RESIDUAL": False}, {"HAS_NORM": False, "HAS_RESIDUAL": True}):
        check_loop(build(matmul_kernels._matmul_kernel, tile.num_warps, **fused, **block), tile.block_n)
    check_loop(build(matmul_kernels._swiglu_kernel, tile.num_warps, **block), 2 * tile.block_n)
build(attention_kernels._rotate_and_store_kernel, 1, BLOCK_HALF=64)
split = {"BLOCK": attention_kernels.BLOCK_TOKENS}
build(attention_kernels._split_attention_kernel, 4, **split, GROUP=1, BLOCK_GROUP=16, BLOCK_DIM=128)
build(attention_kernels._split_attention_kernel, 4, **split, GROUP=8, BLOCK_GROUP=16, BLOCK_DIM=128)
build(attention_kernels._combine_kernel, 4, BLOCK_SPLITS=8, BLOCK_DIM=128)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="NOT TESTED: the Triton kernels; triton is not installed")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    """For compute capability 8.0 (A100) and 9.0 (H100, H200)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
