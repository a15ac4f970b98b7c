"""Seeded cases that compare prompt lookup with plain decoding of the same build, token by token."""

import functools
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.engine import Engine
from llama2_server.engine.model.cpu_kernels import CpuKernels
from llama2_server.engine.model.weight_layout import AMX
from llama2_server.engine.native.library import NativeUnavailable, find_instructions
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import Sequence, SequenceResult
from llama2_server.engine.step_planner import StepPolicy
from llama2_server.engine.steps.report import StepReport

VOCAB, CONTEXT, SLOTS = 600, 512, 8
CYCLE = 24  # of the checkpoint; see tools/make_checkpoint.py
END_IDS = frozenset({2, 330, 475})
MAX_CONCURRENT = 8


@dataclass(frozen=True, slots=True)
class Case:
    """A request, and the conversation that it continues."""

    prompt_ids: list[int]
    params: GenerationParams
    stop_pair: tuple[int, int] | None
    """Two tokens that end the reply, as a stop sequence does."""
    cache_scope: str | None


@dataclass(slots=True)
class Reply:
    """Everything that a request can observe; also the listener that collects it."""

    stop_pair: tuple[int, int] | None = None
    cancel_after: int | None = None
    sequence: Sequence | None = None
    submitted: threading.Event = field(default_factory=threading.Event)
    token_ids: list[int] = field(default_factory=list)
    finish: "Future[SequenceResult]" = field(default_factory=Future)
    then: Callable[[], object] = lambda: None

    def on_token(self, token_id: int) -> bool:
        """Store the token; return whether the stop sequence ends here."""
        self.token_ids.append(token_id)
        if len(self.token_ids) == self.cancel_after:
            assert self.submitted.wait(60)
            assert self.sequence is not None
            self.sequence.cancel()
        return self.stop_pair is not None and tuple(self.token_ids[-2:]) == self.stop_pair

    def on_finish(self, result: SequenceResult) -> None:
        """Store the result, and start what follows."""
        self.finish.set_result(result)
        self.then()

    def observed(self, *, with_reuse: bool) -> tuple[list[int], SequenceResult]:
        """Wait for the end, and return the tokens and the result, with or without the reused tokens."""
        result = self.finish.result(timeout=120)
        if not with_reuse:
            result = SequenceResult(result.reason, result.input_tokens, result.output_tokens)
        return self.token_ids, result


@dataclass(slots=True)
class Counts:
    """The numbers of steps and guesses of an engine."""

    steps: int = 0
    proposed: int = 0
    accepted: int = 0
    mixed: int = 0

    def add(self, step: StepReport) -> None:
        """Count a step."""
        self.steps += 1
        self.proposed += step.proposed
        self.accepted += step.accepted
        self.mixed += step.phase == "mixed"


def families() -> list[CpuKernels]:
    """Return the families of native kernels that this processor supports."""
    try:
        find_instructions(AMX)
    except NativeUnavailable:
        return ["portable"]
    return ["portable", "amx"]


class Pair:
    """Two engines over the same weights: with prompt lookup, and without."""

    def __init__(
        self, checkpoint: Path, end_ids: frozenset[int] = END_IDS, cpu_kernels: CpuKernels = "portable"
    ) -> None:
        self.counts, self.plain_counts = Counts(), Counts()
        self._engines = [
            Engine(
                load_model(
                    checkpoint,
                    device="cpu",
                    dtype=torch.float16,
                    context_length=CONTEXT,
                    slots=SLOTS,
                    cpu_kernels=cpu_kernels,
                ),
                end_ids,
                on_step=counts.add,
                step_policy=StepPolicy(prompt_lookup=counts is self.counts),
            )
            for counts in (self.counts, self.plain_counts)
        ]

    def differences(self, cases: list[Case]) -> list[str]:
        """Return the cases in which the engines differ: two thirds run alone, then the others up to eight at once.

        After a group, the slots that hold earlier prompts depend on who ended first, and so does what a case reuses.
        """
        alone = 2 * len(cases) // 3
        found = []
        for index in range(2):
            observed = [reply.observed(with_reuse=True) for reply in self.run_in_turn(index, cases[:alone])]
            for start in range(alone, len(cases), MAX_CONCURRENT):
                group = self.run(index, cases[start : start + MAX_CONCURRENT])
                observed += [reply.observed(with_reuse=False) for reply in group]
            found.append(observed)
        return [
            f"{case}:\n  prompt lookup: {guessed}\n  plain:         {plain}"
            for case, guessed, plain in zip(cases, *found, strict=True)
            if guessed != plain
        ]

    def close(self) -> None:
        """End the engines."""
        for engine in self._engines:
            assert engine.close(timeout_seconds=60)

    def run(self, index: int, cases: list[Case]) -> list[Reply]:
        """Submit cases to the engine with prompt lookup (0) or to the plain one (1)."""
        replies = [Reply(case.stop_pair) for case in cases]
        for case, reply in zip(cases, replies, strict=True):
            reply.sequence = self._engines[index].submit(case.prompt_ids, case.params, reply, case.cache_scope)
        return replies

    def run_in_turn(self, index: int, cases: list[Case]) -> list[Reply]:
        """Submit each case when the one before has ended, without a change of threads, and wait for the last."""
        replies = [Reply(case.stop_pair) for case in cases]

        def submit(number: int) -> None:
            case = cases[number]
            self._engines[index].submit(case.prompt_ids, case.params, replies[number], case.cache_scope)

        for number, reply in enumerate(replies[:-1]):
            reply.then = functools.partial(submit, number + 1)
        if replies:
            submit(0)
            replies[-1].finish.result(timeout=3600)
        return replies

    def run_and_cancel(self, index: int, case: Case, after: int) -> Reply:
        """Submit a case that is cancelled while its token number `after` is passed on."""
        reply = Reply(cancel_after=after)
        reply.sequence = self._engines[index].submit(case.prompt_ids, case.params, reply, case.cache_scope)
        reply.submitted.set()
        return reply


def some_cases(seed: int, count: int) -> list[Case]:
    """Return cases, the same for the same seed."""
    draw = random.Random(seed)
    texts = [_text(draw, draw.randint(2, 200)) for _ in range(12)]
    return [_case(draw, texts) for _ in range(count)]


def _case(draw: random.Random, texts: list[list[int]]) -> Case:
    # Prompts share their first tokens with earlier ones, so that a slot is reused.
    text = draw.choice(texts)
    prompt_ids = text[: draw.randint(1, len(text))] + _text(draw, draw.choice((0, 1, 30)))
    params = GenerationParams(
        draw.choice((1, 2, 5, 17, 40, 80)),
        temperature=draw.choice((0.0, 0.0, 0.6, 1.0, 1.3)),
        top_p=draw.choice((0.5, 0.9, 1.0)),
        top_k=draw.choice((0, 0, 1, 5, 50)),
        seed=draw.randrange(2**32),
        repetition_penalty=draw.choice((1.0, 1.0, 1.0, 1.05, 1.3)),
        frequency_penalty=draw.choice((0.0, 0.0, 0.0, 0.3, -0.2)),
        presence_penalty=draw.choice((0.0, 0.0, 0.0, 0.5)),
    )
    first = draw.randrange(CYCLE, VOCAB - 1)
    stop_pair = (first, first + 1) if draw.random() < 0.3 else None
    return Case(prompt_ids, params, stop_pair, draw.choice((None, "a", "a", "b")))


def _text(draw: random.Random, length: int) -> list[int]:
    """Return tokens that repeat and edit earlier passages."""
    token_ids: list[int] = []
    while len(token_ids) < length:
        start = draw.randrange(CYCLE, VOCAB - 40)
        passage = list(range(start, start + draw.randint(1, 30)))
        if token_ids and draw.random() < 0.5:
            at = draw.randrange(len(token_ids))
            passage = token_ids[at : at + 30]
        token_ids += passage
    return token_ids[:length]
