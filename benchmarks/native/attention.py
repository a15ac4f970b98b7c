"""Measure how fast a decode step reads the KV cache, next to the weights and to the memory's read bandwidth.

    python -m benchmarks.native.attention --checkpoint DIR --position 2048

A step at position 0 reads the weights. A step at a later position also reads that many keys and values; the difference
of the lowest times is theirs. With one thread, the times are CPU times of that thread.
"""

import argparse
import os
import time
from pathlib import Path

import torch

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.model.kv_cache import KVCache
from llama2_server.engine.model.native_decoder import NativeDecoder
from llama2_server.engine.native.library import read_bandwidth, use_huge_pages


def lowest_seconds(decoder: NativeDecoder, positions: tuple[int, ...], rounds: int, threads: int) -> dict[int, float]:
    """Return the lowest time of a step by position; each round measures every position once."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    lowest = dict.fromkeys(positions, float("inf"))
    for _ in range(rounds):
        for position in positions:
            started_at = clock()
            decoder.decode([0], [5], [position])
            lowest[position] = min(lowest[position], clock() - started_at)
    return lowest


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory of a checkpoint")
    parser.add_argument("--position", type=int, default=2048, help="keys and values that the later step reads")
    parser.add_argument("--rounds", type=int, default=60, help="rounds")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of the decoder")
    arguments = parser.parse_args()
    position = arguments.position
    model = load_model(
        arguments.checkpoint,
        device="cpu",
        dtype=torch.float16,
        context_length=position + 1,
        slots=1,
        cpu_weight_bits="16",
    )
    with torch.inference_mode():
        for layer in (*model.kv_cache.keys, *model.kv_cache.values):
            layer.normal_()  # unwritten memory would be read from one page
    decoder = NativeDecoder(model.config, model.weights, model.kv_cache, model.rotary, threads=arguments.threads)
    lowest = lowest_seconds(decoder, (0, position), arguments.rounds, arguments.threads)
    cached = KVCache.size_bytes(model.config, 1, position, torch.float16)
    memory = torch.empty(1 << 30, dtype=torch.uint8)
    use_huge_pages(memory)
    memory.zero_()
    rates = {
        "keys and values": cached / (lowest[position] - lowest[0]),
        "weights": model.weights.size_bytes / lowest[0],
        "memory": max(read_bandwidth(memory, arguments.threads) for _ in range(5)),
    }
    print(f"{decoder.instructions}, threads: {arguments.threads}, position: {position}")
    for name, rate in rates.items():
        print(f"{name:16} {rate / 1e9:5.1f} GB/s, {rate / rates['memory']:.0%} of the memory's rate")


if __name__ == "__main__":
    main()
