"""What requests gain from one another in the bare engine: steps that they share, and prefixes that are reused.

    python -m benchmarks.sharing --checkpoint DIR

Shared steps: 8 requests at once in 8 slots, against the same 8 one after another in the same engine. Reused prefixes:
the second turn of a chat of 1,500 tokens, against the same prompt prefilled from the start. Medians over the rounds,
of ratios within a round.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch

from benchmarks.compare import Times
from llama2_server.engine.checkpoint import read_config
from llama2_server.engine.engine import Engine
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.weights import load_model

REQUESTS = 8
PROMPT_TOKENS = 128
NEW_TOKENS = 32
CHAT_TOKENS, TURN_TOKENS = 1_400, 60
CONTEXT = 2048


def start(engine: Engine, prompt_ids: list[int], tokens: int, owner: str | None = None) -> Times:
    """A greedy request that is under way."""
    times = Times()
    engine.submit(prompt_ids, GenerationParams(tokens, temperature=0), times, owner)
    return times


def some_ids(chance: random.Random, count: int, vocab_size: int) -> list[int]:
    """Token ids that mean nothing."""
    return chance.choices(range(3, vocab_size), k=count)


def shared_steps(engine: Engine, chance: random.Random, vocab_size: int) -> tuple[float, float]:
    """Tokens/s of all requests together: one after another, and at once; prefill included."""
    prompts = [some_ids(chance, PROMPT_TOKENS, vocab_size) for _ in range(REQUESTS)]
    begun = time.perf_counter()
    for prompt in prompts:
        start(engine, prompt, NEW_TOKENS).ended.get()
    alone = time.perf_counter() - begun
    begun = time.perf_counter()
    for times in [start(engine, prompt, NEW_TOKENS) for prompt in prompts]:
        times.ended.get()
    together = time.perf_counter() - begun
    return REQUESTS * NEW_TOKENS / alone, REQUESTS * NEW_TOKENS / together


def second_turn(engine: Engine, chance: random.Random, vocab_size: int) -> tuple[float, float]:
    """Seconds to the first token of a chat's second turn: from the start, and reusing the first."""
    first = some_ids(chance, CHAT_TOKENS, vocab_size)
    said = start(engine, first, TURN_TOKENS, owner="a")
    said.ended.get()
    second = first + said.token_ids + some_ids(chance, TURN_TOKENS, vocab_size)
    seconds = []
    for owner in ("a", None):
        begun = time.perf_counter()
        times = start(engine, second, 2, owner)
        times.ended.get()
        seconds.append((times.first or begun) - begun)
    return seconds[1], seconds[0]


def main() -> None:
    """Parse the flags, run the rounds, print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    vocab_size = read_config(arguments.checkpoint).vocab_size
    model = load_model(arguments.checkpoint, device="cpu", dtype=torch.float16, context_length=CONTEXT, slots=REQUESTS)
    engine, chance = Engine(model, frozenset()), random.Random(0)
    start(engine, some_ids(chance, 8, vocab_size), 2).ended.get()
    steps = [shared_steps(engine, chance, vocab_size) for _ in range(arguments.rounds)]
    turns = [second_turn(engine, chance, vocab_size) for _ in range(arguments.rounds)]
    print(f"{REQUESTS} requests of {PROMPT_TOKENS} + {NEW_TOKENS} tokens, float16, {arguments.rounds} rounds\n")
    print("| | tokens/s of all together | |\n|---|---|---|")
    ratio = statistics.median(together / alone for alone, together in steps)
    print(f"| one after another | {statistics.median(alone for alone, _ in steps):.1f} | 1.00 |")
    print(f"| at once | {statistics.median(together for _, together in steps):.1f} | {ratio:.2f} x |")
    print(f"\nThe second turn of a chat, {CHAT_TOKENS + 2 * TURN_TOKENS} tokens\n")
    print("| | time to first token | |\n|---|---|---|")
    ratio = statistics.median(warm / cold for cold, warm in turns)
    print(f"| from the start | {statistics.median(cold for cold, _ in turns) * 1000:.0f} ms | 100% |")
    print(f"| after the first turn | {statistics.median(warm for _, warm in turns) * 1000:.0f} ms | {ratio:.1%} |")


if __name__ == "__main__":
    main()
