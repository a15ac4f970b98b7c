"""What the benchmark and a worker process say to each other: a line of JSON there, a line of JSON back.

The first line is a `Setup`; the answer tells what the worker computes with. Every other line names a method, and the
answer is what it returns.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Protocol


@dataclass(frozen=True)
class Setup:
    """What to load, and how."""

    checkpoint: str
    folder: str  # for converted weights; empty at first, the same for all runs of a checkpoint
    arithmetic: str  # which of a contender's precisions; "" where it has one
    context_length: int  # tokens of one sequence
    slots: int  # sequences at once
    threads: int


@dataclass(frozen=True)
class Generated:
    """One generation of as many replies as there were prompts, together; greedy, and no end of sequence ends it."""

    token_ids: list[list[int]]
    first_seconds: float  # until every reply had its first token
    total_seconds: float


class Generator(Protocol):
    """A contender's side."""

    @property
    def arithmetic(self) -> str:
        """What weights are stored in, and what they are multiplied in, in words."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions whose versions belong beside the figures."""

    def generate(self, prompts: list[list[int]], tokens: int) -> Generated:
        """Continue prompts of one length by so many tokens each."""


def serve(load: Callable[[Setup], Generator]) -> None:
    """Answer on stdin and stdout until stdin ends."""
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    generator = load(Setup(**json.loads(sys.stdin.readline())))
    versions = {package: metadata.version(package) for package in generator.packages}
    _say(answers.write, {"arithmetic": generator.arithmetic, "versions": versions})
    answers.flush()
    for line in sys.stdin:
        question = json.loads(line)
        method = question.pop("method")
        answer = getattr(generator, method)(**question)
        _say(answers.write, asdict(answer) if isinstance(answer, Generated) else answer)
        answers.flush()


def _say(write: Callable[[str], object], answer: object) -> None:
    write(json.dumps(answer) + "\n")
