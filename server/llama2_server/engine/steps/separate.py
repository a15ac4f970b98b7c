"""Separate steps for prompts and decoding sequences.

If the device samples the tokens, the engine computes one step ahead of the tokens that it reads
(SeparateStepRunner.lookahead). It drops tokens computed for a sequence that has ended.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable

from llama2_server.engine.sequence import Sequence, TokenOrError
from llama2_server.engine.step_runner import SeparateStepRunner
from llama2_server.engine.steps.report import StepPhase, StepReport
from llama2_server.engine.steps.running import RunningSequences


class SeparateSteps:
    """Advances the running sequences by a part of one prompt, then by one token each."""

    def __init__(
        self,
        step_runner: SeparateStepRunner,
        running: RunningSequences,
        chunk_tokens: int,
        on_step: Callable[[StepReport], None],
    ) -> None:
        self._step_runner = step_runner
        self._running = running
        self._chunk_tokens = chunk_tokens
        self._on_step = on_step
        self._in_flight: deque[tuple[list[Sequence], Iterable[TokenOrError]]] = deque()

    def advance(self) -> None:
        """Run a prefill step and a decode step, as far as there is work."""
        self._timed(StepPhase.PREFILL, self._prefill_chunk)
        self._running.drop_cancelled()
        self._timed(StepPhase.DECODE, self._decode_step)

    def _timed(self, phase: StepPhase, step: Callable[[], int]) -> None:
        # Sampling waits for the device, so the duration includes work that the device does asynchronously.
        started_at = time.perf_counter()
        rows = step()
        if rows:
            self._on_step(StepReport(phase, time.perf_counter() - started_at, rows))

    def _prefill_chunk(self) -> int:
        """Prefill one chunk of one prompt and return its number of tokens.

        A long prompt therefore delays a cancellation and the other sequences by one chunk at most.
        """
        sequence = self._running.prefilling
        if sequence is None:
            return 0
        chunk = sequence.prompt_ids[sequence.position :][: self._chunk_tokens]
        try:
            tokens = self._step_runner.prefill(sequence, chunk)
        except Exception as error:
            self._running.fail(sequence, error)
            return 0
        sequence.position += len(chunk)
        if not sequence.prefilling:
            self._enqueue([sequence], tokens)
        return len(chunk)

    def _decode_step(self) -> int:
        """Compute one token for each decoding sequence and return the number of rows."""
        rows = self._running.decoding
        if not rows:
            self._collect(max_in_flight=0)
            return 0
        try:
            tokens = self._step_runner.decode(rows)
        except Exception as error:
            for sequence in rows:
                self._running.fail(sequence, error)
            return 0
        for sequence in rows:
            sequence.position += 1
        self._enqueue(rows, tokens)
        return len(rows)

    def _enqueue(self, rows: list[Sequence], tokens: Iterable[TokenOrError]) -> None:
        """Register a started step, and collect all steps except the last `lookahead` ones."""
        for sequence in rows:
            sequence.requested += 1
        self._in_flight.append((rows, tokens))
        self._collect(max_in_flight=self._step_runner.lookahead)

    def _collect(self, *, max_in_flight: int) -> None:
        """Read the tokens of the oldest steps until at most `max_in_flight` steps are left."""
        while len(self._in_flight) > max_in_flight:
            rows, tokens = self._in_flight.popleft()
            try:
                for sequence, token in zip(rows, tokens, strict=True):
                    self._running.emit(sequence, token)
            except Exception as error:  # a device error: no token of this step is available
                for sequence in rows:
                    self._running.fail(sequence, error)
