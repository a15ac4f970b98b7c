"""A long prompt that arrives while another request receives its reply: pauses of the reply, time of the prompt."""

import random
import statistics
from pathlib import Path

import torch

from benchmarks.rows.timed_engine import TimedReply
from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.engine import Engine
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.step_planner import StepPolicy

PROMPT_TOKENS = 2000
STREAM_PROMPT_TOKENS = 64
ALONE_TOKENS = 16
MIN_GAP_GOAL_SECONDS = 0.15
# What a step with a prompt may take: the default, and no limit, so that each step has 48 prompt tokens.
LIMITS = (0.1, 1e9)


def measure(checkpoint: Path, rounds: int) -> None:
    """Print medians over the rounds; in each round all limits are measured one after another."""
    model = load_model(
        checkpoint, device="cpu", dtype=torch.float16, context_length=2 * PROMPT_TOKENS, slots=2, threads=1
    )
    draw = random.Random(0)
    found: dict[float, list[tuple[float, float, float, float]]] = {limit: [] for limit in LIMITS}
    for _ in range(rounds):
        for limit in LIMITS:
            policy = StepPolicy(prompt_lookup=False, max_mixed_step_seconds=limit)
            engine = Engine(model, frozenset(), step_policy=policy)
            found[limit].append(_round(engine, draw))
            engine.close()
    for limit, values in found.items():
        plain, gap, alone, among = (statistics.median(column) for column in zip(*values, strict=True))
        slower = statistics.median(value[3] / value[2] for value in values)
        goal = max(MIN_GAP_GOAL_SECONDS, 2 * plain)
        name = "default, 100 ms" if limit == LIMITS[0] else "no limit"
        print(
            f"| {name} | {1e3 * plain:.0f} ms | {1e3 * gap:.0f} ms, goal {1e3 * goal:.0f} ms "
            f"| {alone:.2f} s | {among:.2f} s, {slower:.2f} x |",
            flush=True,
        )


def _round(engine: Engine, draw: random.Random) -> tuple[float, float, float, float]:
    """Return the median plain step, the longest gap, and the prompt's first token alone and next to a stream."""
    alone = _submit(engine, draw, PROMPT_TOKENS, 1)
    alone.wait()
    stream = _submit(engine, draw, STREAM_PROMPT_TOKENS, PROMPT_TOKENS)
    stream.wait(ALONE_TOKENS)
    prompt = _submit(engine, draw, PROMPT_TOKENS, 1)
    prompt.wait()
    gaps = [after - before for before, after in zip(stream.times, stream.times[1:ALONE_TOKENS], strict=False)]
    stream.wait(len(stream.token_ids) + 1)
    gap = stream.longest_gap(prompt.started_at, prompt.times[0])
    return statistics.median(gaps), gap, alone.first_token_seconds, prompt.first_token_seconds


def _submit(engine: Engine, draw: random.Random, prompt_tokens: int, tokens: int) -> TimedReply:
    reply = TimedReply()
    prompt_ids = draw.choices(range(300, 900), k=prompt_tokens)
    engine.submit(prompt_ids, GenerationParams(tokens, temperature=0), reply)
    return reply
