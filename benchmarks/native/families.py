"""Compare the two families of CPU kernels, portable and amx, on a CPU with Intel AMX: steps of the native decoder.

    python -m benchmarks.native.families --checkpoint DIR

Each round runs the same step with the portable kernels at 16 bits, at 12 bits, and with AMX at 12 bits, one after
another. It prints the median of the times, and of the ratios to AMX within a round: above 1 means that AMX is faster.
"""

import argparse
import os
import statistics
from functools import partial
from itertools import repeat
from pathlib import Path

import torch

from benchmarks.native.steps import POSITION, ROWS, Step, decode, prefill, prompt, times_in_rounds
from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.model.cpu_kernels import CpuKernels
from llama2_server.engine.model.native_decoder import NativeDecoder
from llama2_server.engine.model.packed_weights import CpuWeightBits

PROMPTS = (128, 512, 2048)
WAYS: tuple[tuple[CpuKernels, CpuWeightBits], ...] = (("portable", "16"), ("portable", "12"), ("amx", "12"))


def load(
    checkpoint: Path, way: tuple[CpuKernels, CpuWeightBits], threads: int, slots: int, context: int
) -> NativeDecoder:
    """Load a checkpoint in one of the ways, and write to the keys and values that decode steps read."""
    kernels, bits = way
    model = load_model(
        checkpoint,
        device="cpu",
        dtype=torch.float16,
        context_length=context,
        slots=slots,
        cpu_kernels=kernels,
        cpu_weight_bits=bits,
        threads=threads,
    )
    if model.native is None or model.kernels != kernels:
        raise SystemExit(f"this processor does not run the model with the {kernels} kernels")
    for slot in range(slots):
        model.native.prefill(slot, prompt(POSITION + 1), 0)
    return model.native


def compare(name: str, step: Step, decoders: list[NativeDecoder], rounds: int) -> None:
    """Print the times of one step, and their ratios to the last decoder's."""
    seconds = times_in_rounds(step, decoders, rounds)
    times_text = " ".join(f"{statistics.median(times) * 1e3:8.1f}" for times in zip(*seconds, strict=True))
    ratios = [[one / times[-1] for one in times[:-1]] for times in seconds]
    ratios_text = ", ".join(f"{statistics.median(column):.2f} x" for column in zip(*ratios, strict=True))
    print(f"{name:22} {times_text} ms   {ratios_text}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory of a checkpoint")
    parser.add_argument("--rounds", type=int, default=10, help="rounds per decode step; prompts have a third of them")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of the decoders")
    arguments = parser.parse_args()
    print("times of " + ", ".join(f"{kernels} at {bits} bits" for kernels, bits in WAYS) + "; portable / AMX")
    load_each = partial(map, partial(load, arguments.checkpoint), WAYS, repeat(arguments.threads))
    # Separate models, because keys and values of long prompts in many slots would not fit in memory.
    decoders = list(load_each(repeat(max(ROWS)), repeat(2 * POSITION)))
    for rows in ROWS:
        compare(f"decode, {rows} rows", decode(rows), decoders, arguments.rounds)
    decoders = list(load_each(repeat(1), repeat(max(PROMPTS))))
    for tokens in PROMPTS:
        compare(f"prefill, {tokens} tokens", prefill(tokens), decoders, max(arguments.rounds // 3, 1))


if __name__ == "__main__":
    main()
