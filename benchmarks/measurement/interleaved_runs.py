"""Rounds of generations: in each round every contender does every case once, one after another.

A machine that slows down so slows all of them, and ratios are taken within a round.
"""

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.engines.peers import Peer
from benchmarks.engines.service import Service
from benchmarks.engines.under_test import Contender, NotRun, Run, Worker
from benchmarks.measurement.cpu_usage import others_share
from benchmarks.measurement.disturbance import Figures, measured
from benchmarks.prompts import Prompt, Prompts
from benchmarks.workers.protocol import Setup

WARM_UP_PROMPT = 16
SETTLE_SECONDS = 0.5
ENGINE, SERVICE = "engine", "service"


@dataclass(frozen=True)
class Case:
    """So many requests at once, each of a prompt and new tokens."""

    prompt_tokens: int
    new_tokens: int
    requests: int = 1


@dataclass(frozen=True)
class Ground:
    """Where and how a part is run: the weights, a folder for their conversions, the threads of each contender."""

    checkpoint: Path
    folder: Path
    threads: int
    attempts: int  # at a measurement that others disturb


class TokensDiffer(Exception):
    """Engine and service, which compute the same, said different things."""


class Rounds:
    """Engine, service and some peers, loaded; close it."""

    def __init__(self, ground: Ground, cases: list[Case], peers: Mapping[Peer, str]) -> None:
        """`peers` with their Pythons; `not_run` tells which of them could not be loaded, and why."""
        self._ground, self._cases = ground, cases
        self._prompts = Prompts(ground.checkpoint, random.SystemRandom().getrandbits(32))
        self._context_length = max(case.prompt_tokens + case.new_tokens for case in cases)
        self._slots = max(case.requests for case in cases)
        self.not_run: dict[str, str] = {}
        self._open = ExitStack()
        with ExitStack() as opening:
            self._engine = opening.enter_context(closing(self._worker("engine", "").ready()))
            service = Service(ground.checkpoint, context_length=self._context_length, slots=self._slots)
            opening.enter_context(closing(service))
            self._contenders: dict[str, Contender] = {ENGINE: self._engine, SERVICE: service}
            for peer, python in peers.items():
                self._add(peer, python, opening)
            self._warm_up()
            self._open = opening.pop_all()

    def close(self) -> None:
        """End all processes."""
        self._open.close()

    def about(self) -> dict[str, Any]:
        """Arithmetic and versions of every contender."""
        return {name: contender.about() for name, contender in self._contenders.items()}

    def run(self) -> Iterator[Figures]:
        """One round's measurements, one by one; raises TokensDiffer."""
        for case in self._cases:
            prompts = self._some_prompts(case)
            runs: dict[str, Run] = {}
            for name in self._contenders:
                # Thread pools wait in a busy loop for a while before they go to sleep.
                time.sleep(SETTLE_SECONDS)
                measure = partial(self._measure, name, prompts, case, runs)
                watch = partial(others_share, resting=self._resting(name))
                figures = measured(measure, attempts=self._ground.attempts, watch=watch)
                ours = runs[ENGINE].token_ids or []
                yield figures | {"contender": name, "agreeing": self._agreeing(ours, runs[name])}

    def _worker(self, module: str, arithmetic: str, python: str | None = None) -> Worker:
        ground = self._ground
        setup = Setup(
            str(ground.checkpoint), str(ground.folder), arithmetic, self._context_length, self._slots, ground.threads
        )
        return Worker(module, setup, *([python] if python else []))

    def _add(self, peer: Peer, python: str, opening: ExitStack) -> None:
        worker = opening.enter_context(closing(self._worker(peer.module, peer.arithmetic, python)))
        try:
            self._contenders[peer.name] = worker.ready()
        except NotRun as error:
            self.not_run[peer.name] = str(error)

    def _warm_up(self) -> None:
        for contender in self._contenders.values():
            for requests in {1, self._slots}:
                contender.generate(self._some_prompts(Case(WARM_UP_PROMPT, 4, requests)), 4)

    def _resting(self, name: str) -> set[int]:
        """The processes of all contenders but one."""
        return {other.process_id for label, other in self._contenders.items() if label != name}

    def _some_prompts(self, case: Case) -> list[Prompt]:
        return [self._prompts.of_length(case.prompt_tokens) for _ in range(case.requests)]

    def _measure(self, name: str, prompts: list[Prompt], case: Case, runs: dict[str, Run]) -> Figures:
        """The figures of one contender; the engine's have the memory's speed just before and after it."""
        reads = [self._engine.ask("read_bandwidth")] if name == ENGINE else []
        runs[name] = run = self._contenders[name].generate(prompts, case.new_tokens)
        reads += [self._engine.ask("read_bandwidth")] if name == ENGINE else []
        figures = {
            "prompt_tokens": case.prompt_tokens,
            "requests": case.requests,
            "output_tokens": run.output_tokens,
            "first_seconds": round(run.first_seconds, 5),
            "total_seconds": round(run.total_seconds, 5),
        }
        return figures | ({"read_bytes_a_second": round(sum(reads) / 2)} if all(reads) and reads else {})

    def _agreeing(self, ours: list[list[int]], theirs: Run) -> int:
        """How many of a reply's tokens are the engine's before one differs, at least."""
        if theirs.texts is not None:
            if theirs.texts != [self._prompts.continuation(token_ids) for token_ids in ours]:
                raise TokensDiffer(f"{ours} by the engine, {theirs.texts} by the service")
            return len(ours[0])
        pairs = zip(ours, theirs.token_ids or [], strict=True)
        return min(_equal_at_first(one, other) for one, other in pairs)


def _equal_at_first(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(one))
