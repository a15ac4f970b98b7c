"""Prompt lookup of other libraries next to ours: each with and without it, on a model whose replies repeat the prompt.

Replies are greedy, so that all engines give the same tokens if they follow the model. Rounds are interleaved. Times are
elapsed times with all cores, so nothing else should run.
"""

import os
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engines.peers import Peer, find_interpreter, select_peers
from benchmarks.engines.under_test import SkippedPeer
from benchmarks.engines.worker import Worker
from benchmarks.rows.prompt_lookup import cyclic_prompt
from benchmarks.workers.protocol import Generated, Setup

CONTEXT_LENGTH = 1024
TOKENS = 200
OURS = Peer("ours", "engine", "", ("torch",))
CONTENDERS = (
    OURS,
    Peer("llama-cpp-python F16", "llama_cpp_lookup", "llama_cpp", ("llama_cpp", "gguf"), "F16"),
    Peer("llama-cpp-python BF16", "llama_cpp_lookup", "llama_cpp", ("llama_cpp", "gguf"), "BF16"),
    *select_peers("OpenVINO GenAI"),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The workers of one library: without prompt lookup and with it."""

    name: str
    plain: Worker
    guessing: Worker


def measure(checkpoint: Path, folder: Path, rounds: int) -> None:
    """Print a row of a Markdown table for each library that is installed."""
    prompt = cyclic_prompt()
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        pairs = list(_pairs(stack, checkpoint, folder))
        results: dict[str, list[tuple[Generated, Generated]]] = {pair.name: [] for pair in pairs}
        for _ in range(rounds + 1):
            for pair in pairs:
                results[pair.name].append((_generate(pair.plain, prompt), _generate(pair.guessing, prompt)))
    expected = results[OURS.name][0][0].token_ids
    for name, found in results.items():
        kept = found[1:]  # the first round warms up
        ratios = [_seconds(plain) / _seconds(guessing) for plain, guessing in kept]
        speeds = [
            statistics.median((TOKENS - 1) / _seconds(one) for one in column) for column in zip(*kept, strict=True)
        ]
        equal = all(one.token_ids == expected for pair in kept for one in pair)
        steps = kept[-1][1].steps
        per_step = f"{(TOKENS - 1) / steps:.1f}" if steps else "not counted"
        print(
            f"| {name} | {speeds[0]:.1f} | {speeds[1]:.1f} | {statistics.median(ratios):.2f} x "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {per_step} | {'yes' if equal else 'no'} |",
            flush=True,
        )


def _pairs(stack: ExitStack, checkpoint: Path, folder: Path) -> Iterator[Pair]:
    for contender in CONTENDERS:
        python, reason = find_interpreter(contender, {})
        if python is None:
            print(f"{contender.name} does not run: {reason}")
            continue
        workers = []
        try:
            for prompt_lookup in (False, True):
                setup = Setup(
                    checkpoint=str(checkpoint),
                    folder=str(folder),
                    arithmetic=contender.arithmetic,
                    context_length=CONTEXT_LENGTH,
                    slots=1,
                    threads=len(os.sched_getaffinity(0)),
                    prompt_lookup=prompt_lookup,
                )
                worker = Worker(contender.module, setup, python)
                stack.callback(worker.close)
                workers.append(worker.ready())
        except SkippedPeer as error:
            print(f"{contender.name} does not run: {error}")
            continue
        yield Pair(contender.name, *workers)


def _generate(worker: Worker, prompt: list[int]) -> Generated:
    return Generated(**worker.call("generate", prompts=[prompt], tokens=TOKENS, seed=None))


def _seconds(generated: Generated) -> float:
    """Return the time from the first token to the last one."""
    return generated.total_seconds - generated.first_token_seconds
