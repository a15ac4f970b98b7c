"""Decoding with prompt lookup against plain decoding of the same build, in interleaved pairs.

- Replay: the steps are computed in full, and then their tokens are replaced by those of a recorded reply. So the
  recorded reply is the oracle of the guesses, and the time is that of a model that writes this reply.
- Copying model: a made checkpoint (tools/make_checkpoint, --cycle), whose sampled replies repeat passages.
- Random model: random weights at temperature 1, whose replies repeat nothing.
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch

from benchmarks.rows.recorded_texts import RECORDED
from benchmarks.rows.timed_engine import TimedReply, steps_of
from llama2_server.engine.checkpoint.loader import load_model
from llama2_server.engine.engine import Engine
from llama2_server.engine.model.llama import LlamaModel
from llama2_server.engine.model.native_decoder import NativeDecoder
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import Sequence, TokenOrError
from llama2_server.engine.step_planner import Step, StepPolicy
from llama2_server.engine.step_runner import NativeStepRunner
from llama2_server.engine.steps.report import StepReport
from llama2_server.engine.text.tokenizer import Tokenizer

CYCLE = 64
CONTEXT_LENGTH = 1024
SAMPLED_TOKENS = 200


class ReplayRunner(NativeStepRunner):
    """Computes each step in full, and then returns the tokens of `reply` in place of the sampled ones."""

    def __init__(self, decoder: NativeDecoder, reply: list[int]) -> None:
        super().__init__(decoder)
        self._reply = reply

    def run(self, step: Step) -> list[list[TokenOrError]]:
        """Run a step; the recorded reply decides which guesses are right."""
        super().run(step)
        first: list[list[TokenOrError]] = [[self._reply[0]]] if step.completes_prompt else []
        return [*first, *(self._next(rows.sequence, list(rows.guesses)) for rows in step.decoding)]

    def _next(self, sequence: Sequence, guesses: list[int]) -> list[TokenOrError]:
        recorded = self._reply[len(sequence.output_ids) :]
        right = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(guesses, recorded, strict=False))))
        return list(recorded[: right + 1])


@dataclass(frozen=True, slots=True)
class Workload:
    """A reply to measure; `reply` is the recorded one, or None if the model samples."""

    name: str
    prompt_ids: list[int]
    params: GenerationParams
    reply: list[int] | None = None


def recorded_workloads(tokenizer: Tokenizer) -> list[Workload]:
    """Return the replays."""
    found = []
    for name, (request, reply) in RECORDED.items():
        reply_ids = tokenizer.encode_raw(reply)[1:]
        params = GenerationParams(len(reply_ids), temperature=0)
        found.append(Workload(f"replay: {name}", tokenizer.encode_raw(request), params, reply_ids))
    return found


def cyclic_prompt() -> list[int]:
    """Return the token ids of a prompt that has each of four cycles of the copying model once."""
    return [1, *(token for cycle in (5, 9, 12, 7) for token in range(CYCLE * cycle, CYCLE * (cycle + 1)))]


def sampled_workloads(kind: str, temperatures: tuple[float, ...]) -> list[Workload]:
    """Return replies that the model samples after a prompt that has each of four cycles once."""
    return [
        Workload(
            f"{kind} model, temperature {temperature:g}",
            cyclic_prompt(),
            GenerationParams(SAMPLED_TOKENS, temperature=temperature, top_p=1.0, seed=1),
        )
        for temperature in temperatures
    ]


def measure(checkpoint: Path, workloads: list[Workload], rounds: int) -> None:
    """Print the decode time of each workload with and without prompt lookup, a median of the ratios of each round."""
    model = load_model(checkpoint, device="cpu", dtype=torch.float16, context_length=CONTEXT_LENGTH, slots=1, threads=1)
    for workload in workloads:
        ratios, guessing_times, counts = [], [], [0, 0, 0]
        for number in range(rounds + 1):
            guessing, steps = _decode(model, workload, prompt_lookup=True)
            plain, _ = _decode(model, workload, prompt_lookup=False)
            if guessing.token_ids != plain.token_ids:
                raise SystemExit(f"{workload.name}: prompt lookup changed the tokens")
            if number == 0:  # the first round warms up
                continue
            ratios.append(plain.decode_seconds / guessing.decode_seconds)
            guessing_times.append(guessing.decode_seconds)
            counts = [sum(pair) for pair in zip(counts, steps_of(steps), strict=True)]
        decoding, proposed, accepted = counts
        tokens = rounds * (len(guessing.token_ids) - 1)
        per_token = 1e3 * statistics.median(guessing_times) / (len(guessing.token_ids) - 1)
        print(
            f"| {workload.name} | {statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {per_token:.1f} ms | {tokens / decoding:.2f} | {accepted} of {proposed} |",
            flush=True,
        )


def _decode(model: LlamaModel, workload: Workload, *, prompt_lookup: bool) -> tuple[TimedReply, list[StepReport]]:
    if model.native is None:
        raise SystemExit("the native kernels are not available; only they use prompt lookup")
    steps: list[StepReport] = []
    runner = NativeStepRunner(model.native) if workload.reply is None else ReplayRunner(model.native, workload.reply)
    with _engine(model, runner, steps, StepPolicy(prompt_lookup=prompt_lookup)) as engine:
        reply = TimedReply()
        engine.submit(workload.prompt_ids, workload.params, reply)
        reply.wait()
    return reply, steps


@contextmanager
def _engine(
    model: LlamaModel, runner: NativeStepRunner, steps: list[StepReport], policy: StepPolicy
) -> Iterator[Engine]:
    engine = Engine(model, frozenset(), on_step=steps.append, step_runner=runner, step_policy=policy)
    try:
        yield engine
    finally:
        engine.close()
