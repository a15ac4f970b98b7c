"""Compile Triton kernels to machine code without a GPU, and read what ptxas made of them."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import compiler
from triton.backends.compiler import GPUTarget

HALF, FLOAT, NUMBERS = "*fp16", "*fp32", "*i64"
KINDS = {"partials": FLOAT, "log_sum_exps": FLOAT, "statistics": FLOAT, "slots": NUMBERS, "positions": NUMBERS}
KINDS |= {"epsilon": "fp32", "factor": "fp32", "arrived": "*i32"}
KINDS |= {"logits": FLOAT, "penalized": FLOAT, "counts": FLOAT, "table": "*fp64", "sums": "*fp64", "seen": "*i8"}
KINDS |= dict.fromkeys(("firsts", "codes", "last_ids", "token_ids"), NUMBERS)
COUNTS = {"N", "K", "heads", "kv_heads", "context_length", "half", "head_dim", "splits", "next_elements"}
COUNTS |= {"vocab_size", "blocks", "hidden_size"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# The shared memory of a block on every GPU since Ampere.
MAX_SHARED_BYTES = 99 * 1024


@dataclass(frozen=True)
class Built:
    """A kernel in PTX, its SASS instructions if disassembled, and the bytes per thread that it spills to memory."""

    ptx: str
    instructions: list[str]
    spilled_bytes: int

    def before(self, instruction: str) -> list[str]:
        """Return the instructions before the first of this name."""
        return self.instructions[: self.instructions.index(instruction)]


def build(
    capability: int,
    kernel: Any,
    warps: int,
    *,
    sass: bool = False,
    registers: int | None = None,
    float_out: bool = False,
    **constants: Any,
) -> Built:
    """Compile a kernel for 16-bit weights whose sizes and addresses are multiples of 16, as Llama-2-7B's are.

    With `sass`, the machine code is disassembled. `registers` is their maximum number; None leaves it to the compiler.
    With `float_out`, the result is in float32, as the logits are.
    """
    names = kernel.arg_names
    types = {name: KINDS.get(name, "i32" if name in COUNTS else HALF) for name in names}
    types |= dict.fromkeys(constants, "constexpr") | ({"out": FLOAT} if float_out else {})
    values = {(names.index(name),): value for name, value in constants.items()}
    even = [index for index, name in enumerate(names) if types[name] not in ("constexpr", "fp32")]
    source = compiler.ASTSource(
        kernel, types, constexprs=values, attrs={(index,): [["tt.divisibility", 16]] for index in even}
    )
    options: dict[str, Any] = {"num_warps": warps, "maxnreg": registers}
    options |= {"launch_pdl": True} if constants.get("PDL") else {}
    if "GREEDY" in constants:  # sampling, which rounds each operation
        options["enable_fp_fusion"] = False
    built = compiler.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert built.metadata.shared <= MAX_SHARED_BYTES, (kernel, built.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _dump("--dump-resource-usage", file.name)
        code = _dump("-sass", file.name) if sass else ""  # it takes seconds
    spilled = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert spilled, usage
    # A line is: /*0010*/ @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    return Built(built.asm["ptx"], instructions, int(spilled[1]) + int(spilled[2]))


def _dump(flag: str, file: str) -> str:
    return subprocess.run([CUOBJDUMP, flag, file], capture_output=True, text=True, check=True).stdout
