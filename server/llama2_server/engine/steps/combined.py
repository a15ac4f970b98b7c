"""Combined steps: a part of a prompt, the next token of each decoding sequence, and guesses of later tokens.

Each row has the same bits in every step, so neither the neighbors nor the guesses change a token.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from llama2_server.engine.sequence import Sequence, TokenOrError
from llama2_server.engine.step_planner import Step, StepPlanner
from llama2_server.engine.step_runner import NativeStepRunner
from llama2_server.engine.steps.report import StepPhase, StepReport
from llama2_server.engine.steps.running import RunningSequences


class CombinedSteps:
    """Advances the running sequences by one step for all of them."""

    def __init__(
        self,
        step_runner: NativeStepRunner,
        running: RunningSequences,
        planner: StepPlanner,
        on_step: Callable[[StepReport], None],
    ) -> None:
        self._step_runner = step_runner
        self._running = running
        self._planner = planner
        self._on_step = on_step

    def advance(self) -> None:
        """Run one step, if there is work."""
        step = self._planner.plan(self._running.prefilling, self._running.decoding)
        if step is None or not self._start_sampling(step):
            return
        started_at = time.perf_counter()
        try:
            tokens = self._step_runner.run(step)
        except Exception as error:
            for sequence in step.sequences:
                self._running.fail(sequence, error)
            return
        seconds = time.perf_counter() - started_at
        self._planner.learn(step, tokens, seconds)
        accepted = self._advance(step, tokens)
        self._on_step(StepReport(_phase(step), seconds, step.rows, step.guesses, accepted))

    def _start_sampling(self, step: Step) -> bool:
        """Prepare to sample the reply's first token; if that fails, the other sequences continue in the next step."""
        if step.prompt is None or not step.completes_prompt:
            return True
        try:
            self._step_runner.start_sampling(step.prompt)
        except Exception as error:
            self._running.fail(step.prompt, error)
            return False
        return True

    def _advance(self, step: Step, tokens: SequenceOf[SequenceOf[TokenOrError]]) -> int:
        """Pass the tokens on, and return how many of them are right guesses."""
        sampled = step.sampled  # before the position of the prompt changes
        if step.prompt is not None:
            step.prompt.position += len(step.chunk)
        accepted = 0
        for sequence, found in zip(sampled, tokens, strict=True):
            accepted += self._emit(sequence, found, first_position=sequence.position + (sequence is not step.prompt))
        return accepted

    def _emit(self, sequence: Sequence, tokens: SequenceOf[TokenOrError], first_position: int) -> int:
        """Pass tokens on until the sequence ends or is cancelled, and return how many followed the first one.

        `position` leaves out the last token that was passed on, as without guesses. Hence what the
        slot holds beyond is neither reused nor counted.
        """
        for index, token in enumerate(tokens):
            sequence.position = first_position + index
            sequence.requested += 1
            self._running.emit(sequence, token)
            if sequence.ended or sequence.cancelled:
                return index
        return len(tokens) - 1


def _phase(step: Step) -> StepPhase:
    if step.prompt is None:
        return StepPhase.DECODE
    return StepPhase.MIXED if step.decoding else StepPhase.PREFILL
