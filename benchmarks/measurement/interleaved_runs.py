"""Interleaved runs: in each round every engine under test runs every workload once, one after another.

A slower phase of the machine affects all of them equally, and ratios are taken within a round.
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
from benchmarks.engines.under_test import EngineUnderTest, SkippedPeer, TimedRun
from benchmarks.engines.worker import Worker
from benchmarks.measurement.cpu_usage import foreign_cpu_share
from benchmarks.measurement.disturbance import Measurement, measure_undisturbed
from benchmarks.prompts import Prompt, Prompts
from benchmarks.workers.protocol import Setup

WARM_UP_PROMPT_TOKENS = 16
SETTLE_SECONDS = 0.5
ENGINE, SERVICE = "engine", "service"  # names in the results files
GREEDY, DEFAULT = "greedy", "default"


@dataclass(frozen=True)
class Workload:
    """Concurrent requests with prompts and replies of equal length; by default with the card's sampling."""

    prompt_tokens: int
    new_tokens: int
    requests: int = 1
    greedy: bool = False

    @property
    def request(self) -> str:
        """The kind of request in the results file."""
        return GREEDY if self.greedy else DEFAULT


@dataclass(frozen=True)
class Environment:
    """The weights, the folder for converted weights, and the resources of each engine under test."""

    checkpoint: Path
    folder: Path
    threads: int
    attempts: int  # maximum number of attempts per measurement


class TokensDiffer(Exception):
    """Our engine and our service generated different tokens for the same prompt."""


class InterleavedRuns:
    """Our engine, our service and some peers, all loaded; `close` stops them."""

    def __init__(self, environment: Environment, workloads: list[Workload], peers: Mapping[Peer, str]) -> None:
        """Load all engines; `peers` maps each peer to its Python.

        `not_run` contains the reason for each peer that could not be loaded.
        """
        self._environment, self._workloads = environment, workloads
        self._seeds = random.SystemRandom()
        self._prompts = Prompts(environment.checkpoint, self._seeds.getrandbits(32))
        self._context_length = max(workload.prompt_tokens + workload.new_tokens for workload in workloads)
        self._slots = max(workload.requests for workload in workloads)
        self.not_run: dict[str, str] = {}
        self._open = ExitStack()
        with ExitStack() as opening:
            self._engine = opening.enter_context(closing(self._worker("engine", "").ready()))
            service = Service(environment.checkpoint, context_length=self._context_length, slots=self._slots)
            opening.enter_context(closing(service))
            self._engines: dict[str, EngineUnderTest] = {ENGINE: self._engine, SERVICE: service}
            for peer, python in peers.items():
                self._add(peer, python, opening)
            self._warm_up()
            self._open = opening.pop_all()

    def close(self) -> None:
        """Stop all processes."""
        self._open.close()

    def describe(self) -> dict[str, Any]:
        """Return the arithmetic and the versions of every engine under test, by name."""
        return {name: engine.describe() for name, engine in self._engines.items()}

    def run_round(self) -> Iterator[Measurement]:
        """Yield the measurements of one round.

        Raises:
            TokensDiffer: the service and the engine generated different tokens.
        """
        for workload in self._workloads:
            prompts = self._new_prompts(workload)
            runs: dict[str, TimedRun] = {}
            seed = None if workload.greedy else self._seeds.getrandbits(31)
            for name in self._engines:
                # Thread pools spin for a while before they go to sleep.
                time.sleep(SETTLE_SECONDS)
                measure = partial(self._measure, name, prompts, workload, seed, runs)
                watch = partial(foreign_cpu_share, idle=self._other_processes(name))
                measurement = measure_undisturbed(measure, attempts=self._environment.attempts, watch=watch)
                yield measurement | {"contender": name} | self._agreement(runs[ENGINE], runs[name], workload)

    def _worker(self, module: str, arithmetic: str, python: str | None = None) -> Worker:
        environment = self._environment
        setup = Setup(
            str(environment.checkpoint),
            str(environment.folder),
            arithmetic,
            self._context_length,
            self._slots,
            environment.threads,
        )
        return Worker(module, setup, *([python] if python else []))

    def _add(self, peer: Peer, python: str, opening: ExitStack) -> None:
        worker = opening.enter_context(closing(self._worker(peer.module, peer.arithmetic, python)))
        try:
            self._engines[peer.name] = worker.ready()
        except SkippedPeer as error:
            self.not_run[peer.name] = str(error)

    def _warm_up(self) -> None:
        for engine in self._engines.values():
            for requests in {1, self._slots}:
                prompts = self._new_prompts(Workload(WARM_UP_PROMPT_TOKENS, 4, requests))
                for seed in (None, 1):
                    engine.generate(prompts, 4, seed)

    def _other_processes(self, name: str) -> set[int]:
        return {engine.process_id for other, engine in self._engines.items() if other != name}

    def _new_prompts(self, workload: Workload) -> list[Prompt]:
        return [self._prompts.of_length(workload.prompt_tokens) for _ in range(workload.requests)]

    def _measure(
        self, name: str, prompts: list[Prompt], workload: Workload, seed: int | None, runs: dict[str, TimedRun]
    ) -> Measurement:
        """Measure one run; for our engine also measure the memory bandwidth just before and just after it."""
        reads = [self._engine.call("read_bandwidth")] if name == ENGINE else []
        runs[name] = run = self._engines[name].generate(prompts, workload.new_tokens, seed)
        reads += [self._engine.call("read_bandwidth")] if name == ENGINE else []
        measurement = {
            "prompt_tokens": workload.prompt_tokens,
            "requests": workload.requests,
            "request": workload.request,
            "output_tokens": run.output_tokens,
            "first_seconds": round(run.first_token_seconds, 5),
            "total_seconds": round(run.total_seconds, 5),
        }
        return measurement | ({"read_bytes_a_second": round(sum(reads) / 2)} if all(reads) and reads else {})

    def _agreement(self, engine: TimedRun, run: TimedRun, workload: Workload) -> Measurement:
        """Return the length of the shortest common prefix of a reply and the engine's reply to the same prompt.

        Peers sample with other random numbers, so their sampled replies are not compared.
        """
        expected = engine.token_ids or []
        if run.texts is not None:
            if run.texts != [self._prompts.continuation(token_ids) for token_ids in expected]:
                raise TokensDiffer(f"engine: {expected}; service: {run.texts}")
            return {"agreeing": len(expected[0])}
        if run is not engine and not workload.greedy:
            return {}
        pairs = zip(expected, run.token_ids or [], strict=True)
        return {"agreeing": min(_common_prefix(one, other) for one, other in pairs)}


def _common_prefix(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(one))
