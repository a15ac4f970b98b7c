"""Steps of the native decoder, and their times in several decoders."""

import time
from collections.abc import Callable, Sequence

import torch

from llama2_server.engine.model.native_decoder import NativeDecoder

ROWS = (1, 2, 4, 8, 16)
POSITION = 128
"""The position of each row of a decode step."""

Step = Callable[[NativeDecoder], torch.Tensor]


def prompt(tokens: int) -> list[int]:
    """Return token ids of a prompt."""
    return [3 + token % 500 for token in range(tokens)]


def decode(rows: int) -> Step:
    """Return a decode step of this number of rows."""
    slots = list(range(rows))
    return lambda decoder: decoder.decode(slots, [5 + slot for slot in slots], [POSITION] * rows)


def prefill(tokens: int, position: int = 0) -> Step:
    """Return a step that reads this number of tokens of a prompt, from a position on."""
    return lambda decoder: decoder.prefill(0, prompt(tokens), position)


def times_in_rounds(
    step: Step,
    decoders: Sequence[NativeDecoder],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    check: Callable[[list[torch.Tensor]], None] = lambda logits: None,
) -> list[list[float]]:
    """Run a step with each decoder in turn, round by round, after one round to warm up.

    Returns the times of each round in seconds, one per decoder. `check` gets the logits of each round.
    """
    found = []
    for _ in range(rounds + 1):
        times, logits = [], []
        for decoder in decoders:
            started_at = clock()
            logits.append(step(decoder))
            times.append(clock() - started_at)
        check(logits)
        found.append(times)
    return found[1:]
