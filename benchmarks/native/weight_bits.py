"""Compare weights of 12 and 16 bits in memory: steps of the native decoder, loading time and memory.

    python -m benchmarks.native.weight_bits --checkpoint DIR --instructions AVX-512 AVX2 AMX

Each round runs the same step with both, one after another. It prints the ratio of the lowest times and the median of
the ratios within a round: above 1 means that 12 bits are faster. The logits of both must have the same bits. With one
thread, the times are CPU times of that thread.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.native.steps import POSITION, ROWS, Step, decode, prefill, times_in_rounds
from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.model.cpu_kernels import CpuKernels
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.model.native_decoder import NativeDecoder
from llama2_server.engine.model.packed_weights import CpuWeightBits
from llama2_server.engine.model.weight_layout import AMX

CONTEXT_LENGTH = 2 * POSITION
PREFILL_TOKENS = 48
WAYS: tuple[CpuWeightBits, ...] = ("12", "16")


def load(checkpoint: Path, bits: CpuWeightBits, kernels: CpuKernels) -> LlamaModel:
    """Load a checkpoint with one of the two formats for a family of kernels, and print seconds and size."""
    started_at = time.perf_counter()
    model = load_model(
        checkpoint,
        device="cpu",
        dtype=torch.float16,
        context_length=CONTEXT_LENGTH,
        slots=max(ROWS),
        cpu_kernels=kernels,
        cpu_weight_bits=bits,
    )
    seconds, gigabytes = time.perf_counter() - started_at, model.weights.size_bytes / 1e9
    print(f"{model.kernels}, {bits} bits: loaded in {seconds:.2f} s, {gigabytes:.3f} GB", flush=True)
    return model


def steps() -> dict[str, Step]:
    """Return the steps to measure by name."""
    found = {f"decode, {rows} rows": decode(rows) for rows in ROWS}
    return found | {f"prefill, {PREFILL_TOKENS} tokens": prefill(PREFILL_TOKENS, POSITION)}


def compare(name: str, step: Step, decoders: list[NativeDecoder], rounds: int, clock: Callable[[], float]) -> None:
    """Print the ratio of one step."""

    def check(logits: list[torch.Tensor]) -> None:
        if not torch.equal(*logits):
            raise SystemExit(f"{name}: the logits differ")

    seconds = times_in_rounds(step, decoders, rounds, clock=clock, check=check)
    packed, plain = (min(times) * 1e3 for times in zip(*seconds, strict=True))
    median = statistics.median(sixteen / twelve for twelve, sixteen in seconds)
    print(f"{name:20} best {plain / packed:.2f}, median {median:.2f}   {packed:7.1f} {plain:7.1f} ms", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory of a checkpoint")
    parser.add_argument("--rounds", type=int, default=40, help="rounds per step")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of the decoder")
    parser.add_argument(
        "--instructions", nargs="+", default=[""], help="names of instruction sets; by default the best"
    )
    parser.add_argument("--steps", default="", help="only the steps whose names contain this text")
    arguments = parser.parse_args()
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    models: list[LlamaModel] = []
    for instructions in arguments.instructions:
        kernels: CpuKernels = "amx" if instructions == AMX else "portable" if instructions else "auto"
        if not models or kernels != models[0].kernels:
            models = [load(arguments.checkpoint, bits, kernels) for bits in WAYS]
        decoders = [
            NativeDecoder(
                model.config,
                model.weights,
                model.kv_cache,
                model.rotary,
                threads=arguments.threads,
                instructions=instructions,
            )
            for model in models
        ]
        print(f"\n{decoders[0].instructions}, threads: {arguments.threads}; speed at 12 / 16 bits, then both times")
        for name, step in steps().items():
            if arguments.steps in name:
                compare(name, step, decoders, arguments.rounds, clock)


if __name__ == "__main__":
    main()
