"""The protocol between the benchmark and a worker process: one line of JSON per request and per response.

The first request is a `Setup`, and its response describes the worker. Every other request names a method with its
arguments, and the response is the result.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Protocol, TextIO

# The sampling of the default request: the defaults of the 7B card. Every other filter is off.
TEMPERATURE, TOP_P = 0.6, 0.9


@dataclass(frozen=True)
class Setup:
    """The checkpoint to load, and how to load it."""

    checkpoint: str
    folder: str  # for converted weights; empty at first, and shared by all runs of a checkpoint
    arithmetic: str  # the precision; "" if the engine has only one
    context_length: int  # tokens of one sequence
    slots: int  # concurrent sequences
    threads: int
    prompt_lookup: bool = False  # guess tokens from repeated text, with the library's own method


@dataclass(frozen=True)
class Generated:
    """One generation of all prompts at once; it ignores ends of sequence."""

    token_ids: list[list[int]]
    first_token_seconds: float  # until every reply has its first token
    total_seconds: float
    steps: int | None = None  # decode steps, if the library tells


class Generator(Protocol):
    """The worker's side of the protocol."""

    @property
    def arithmetic(self) -> str:
        """A description of the types in which weights are stored and multiplied."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions whose versions the results record."""

    def generate(self, prompts: list[list[int]], tokens: int, seed: int | None) -> Generated:
        """Continue prompts of equal length by `tokens` tokens each; without a seed greedily, else sampled.

        The random numbers of the prompt with index i start from `seed` + i. Libraries that seed all prompts together
        use `seed`.
        """


def serve(load: Callable[[Setup], Generator]) -> None:
    """Load the generator, then serve requests from stdin on stdout until stdin ends."""
    # The output of libraries must not mix with the responses.
    responses = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    generator = load(Setup(**json.loads(sys.stdin.readline())))
    versions = {package: metadata.version(package) for package in generator.packages}
    _write(responses, {"arithmetic": generator.arithmetic, "versions": versions})
    for line in sys.stdin:
        request = json.loads(line)
        method = request.pop("method")
        result = getattr(generator, method)(**request)
        _write(responses, asdict(result) if isinstance(result, Generated) else result)


def _write(responses: TextIO, content: object) -> None:
    responses.write(json.dumps(content) + "\n")
    responses.flush()
