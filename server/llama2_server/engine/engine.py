"""The engine: one thread that owns the model and its KV cache, and works on token ids only.

The thread runs a step loop over a fixed number of slots (continuous batching, Yu et al. 2022, Orca). Sequences join and
leave between steps, and all decoding sequences share each decode step. A cancelled sequence leaves before the next
step. The engine never waits for a reader of its tokens.

The native step combines prompts, decoding sequences and guesses (`step_planner.py`). Other steps are separate: a part
of one prompt, then one token of each decoding sequence.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from collections.abc import Sequence as SequenceOf

from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.interface import Model
from llama2_server.engine.prefix_cache import PrefixCache
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, Sequence, SequenceListener
from llama2_server.engine.step_planner import StepPlanner, StepPolicy
from llama2_server.engine.step_runner import NativeStepRunner, StepKind, StepRunner, host_step_runner
from llama2_server.engine.steps.combined import CombinedSteps
from llama2_server.engine.steps.report import StepReport
from llama2_server.engine.steps.running import RunningSequences
from llama2_server.engine.steps.separate import SeparateSteps


class Engine:
    """Runs sequences on a model; `submit` and `close` are safe from any thread.

    Args:
        model: the model and its KV cache, which only the engine may use from now on.
        eos_ids: token ids that end a sequence.
        prefill_chunk_tokens: maximum number of prompt tokens per step; by default the model's own value.
        on_step: called after each step. It runs on the engine's thread and must be quick.
        step_runner: computes the steps; by default with sampling on the host.
        step_policy: how the rows of combined steps are divided; other steps ignore it.
    """

    def __init__(
        self,
        model: Model,
        eos_ids: frozenset[int],
        *,
        prefill_chunk_tokens: int | None = None,
        on_step: Callable[[StepReport], None] = lambda _: None,
        step_runner: StepRunner | None = None,
        step_policy: StepPolicy | None = None,
    ) -> None:
        self._model = model
        self._step_runner = step_runner or host_step_runner(model)
        chunk_tokens = prefill_chunk_tokens or model.prefill_chunk_tokens
        prefix_cache = PrefixCache(model.slots, 1 if model.chunk_invariant else chunk_tokens)
        self._running = RunningSequences(prefix_cache, eos_ids, reuse_replies=model.chunk_invariant)
        self._steps: SeparateSteps | CombinedSteps
        if isinstance(self._step_runner, NativeStepRunner):
            max_rows = self._step_runner.max_rows
            planner = StepPlanner(
                step_policy or StepPolicy(), max_rows=max_rows, chunk_tokens=chunk_tokens, end_ids=eos_ids
            )
            self._steps = CombinedSteps(self._step_runner, self._running, planner, on_step)
        else:
            self._steps = SeparateSteps(self._step_runner, self._running, chunk_tokens, on_step)
        self._submitted: deque[Sequence] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._step_started_at: float | None = None
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    @property
    def step_kind(self) -> StepKind:
        """How the steps are computed."""
        return self._step_runner.kind

    @property
    def alive(self) -> bool:
        """Whether the engine still accepts sequences."""
        return self._thread.is_alive() and not self._closing

    @property
    def stopped(self) -> bool:
        """Whether the thread has ended, after `close` or by an error."""
        return not self._thread.is_alive()

    @property
    def step_started_at(self) -> float | None:
        """Start of the current step in `time.monotonic` seconds; None between steps."""
        return self._step_started_at

    def submit(
        self,
        prompt_ids: SequenceOf[int],
        params: GenerationParams,
        listener: SequenceListener,
        cache_scope: Hashable | None = None,
    ) -> Sequence:
        """Queue a sequence; its listener is called on the engine's thread.

        A prompt that starts with tokens cached in a free slot for the same `cache_scope` prefills only the rest. None
        disables the reuse.

        Raises:
            ValueError: the prompt is empty, or prompt and `max_tokens` do not fit the context.
            EngineError: the engine has stopped.
        """
        if not prompt_ids or len(prompt_ids) + params.max_tokens > self._model.context_length:
            raise ValueError(
                f"prompt_ids: {len(prompt_ids)} prompt tokens and max_tokens {params.max_tokens}; "
                f"expected at least one prompt token, and at most {self._model.context_length} tokens in total"
            )
        sequence = Sequence(list(prompt_ids), params, listener, cache_scope)
        with self._wake:
            if not self.alive:
                raise EngineError("the engine has stopped")
            self._submitted.append(sequence)
            self._wake.notify()
        return sequence

    def close(self, timeout_seconds: float | None = None) -> bool:
        """Cancel all sequences and end the thread.

        Return False if the thread is still in a step after `timeout_seconds`; None waits without a limit.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _main(self) -> None:
        while self._wait_for_work():
            self._step_started_at = time.monotonic()
            self._running.admit(self._submitted)
            self._running.drop_cancelled()
            self._steps.advance()
            self._step_started_at = None
        for sequence in [*self._running, *self._submitted]:
            self._running.end(sequence, FinishReason.CANCELLED)

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._running or self._running.can_admit(self._submitted))
            return not self._closing
