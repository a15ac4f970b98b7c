"""The engine: one thread that owns the model and its KV cache, and knows token ids only.

It is a step loop over a fixed number of slots: sequences join and leave between steps, and those that are decoding
share each step. A sequence that is cancelled leaves before the next step. It never waits for whoever reads its tokens.

If the device samples the tokens, the engine computes one step ahead of the tokens that it reads
(StepRunner.lookahead). It drops tokens computed for a sequence that has ended.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as SequenceOf

from llama2_server.engine.errors import EngineError
from llama2_server.engine.model.llama import Model
from llama2_server.engine.prefix_cache import PrefixCache
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, Sequence, SequenceListener, SequenceResult
from llama2_server.engine.step_runner import HostStepRunner, StepRunner, TokenOrError

logger = logging.getLogger(__name__)


class Engine:
    """Runs sequences on a model; `submit` and `close` are safe from any thread.

    `on_step` hears of each step: "prefill" or "decode", its seconds, and how many tokens or rows it took. It is called
    on the engine's thread and must be quick. `prefill_chunk_tokens` stands in for the model's own; `steps` says how the
    model's steps are computed, by default with the tokens sampled on the host.
    """

    def __init__(
        self,
        model: Model,
        eos_ids: frozenset[int],
        *,
        prefill_chunk_tokens: int | None = None,
        on_step: Callable[[str, float, int], None] = lambda *_: None,
        step_runner: StepRunner | None = None,
    ) -> None:
        self._model = model
        self._step_runner = step_runner or HostStepRunner(model)
        self._in_flight: deque[tuple[list[Sequence], Iterable[TokenOrError]]] = deque()
        self._on_step = on_step
        self._eos_ids = eos_ids
        self._prefill_chunk_tokens = prefill_chunk_tokens or model.prefill_chunk_tokens
        self._prefix_cache = PrefixCache(model.slots, 1 if model.chunk_invariant else self._prefill_chunk_tokens)
        self._running: list[Sequence] = []
        self._submitted: deque[Sequence] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._step_started_at: float | None = None
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine still takes sequences."""
        return self._thread.is_alive() and not self._closing

    @property
    def step_started_at(self) -> float | None:
        """When the step began that is being computed, by time.monotonic; None between steps."""
        return self._step_started_at

    def submit(
        self,
        prompt_ids: SequenceOf[int],
        params: GenerationParams,
        listener: SequenceListener,
        cache_scope: Hashable | None = None,
    ) -> Sequence:
        """Queue a sequence; its listener hears of it from the engine's thread.

        A prompt that starts with tokens cached in a free slot for the same `cache_scope` prefills only the rest. None
        disables the reuse.

        Raises:
            ValueError: the prompt is empty, or prompt and `max_tokens` do not fit the context.
            EngineError: the engine has stopped.
        """
        if not prompt_ids or len(prompt_ids) + params.max_tokens > self._model.context_length:
            raise ValueError(f"{len(prompt_ids)} + {params.max_tokens} tokens in {self._model.context_length}")
        sequence = Sequence(list(prompt_ids), params, listener, cache_scope)
        with self._wake:
            if not self.alive:
                raise EngineError("the engine has stopped")
            self._submitted.append(sequence)
            self._wake.notify()
        return sequence

    def close(self, timeout_seconds: float | None = None) -> bool:
        """Cancel what runs and end the thread; False if it was still in a step after the timeout."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _main(self) -> None:
        while self._wait_for_work():
            self._step_started_at = time.monotonic()
            self._admit()
            self._drop_cancelled()
            self._timed("prefill", self._prefill_chunk)
            self._drop_cancelled()
            self._timed("decode", self._decode_step)
            self._step_started_at = None
        for sequence in [*self._running, *self._submitted]:
            self._end(sequence, FinishReason.CANCELLED)

    def _timed(self, phase: str, step: Callable[[], int]) -> None:
        # With the sampling, which waits for the device: what the device does behind our back would not be seen.
        begun = time.perf_counter()
        rows = step()
        if rows:
            self._on_step(phase, time.perf_counter() - begun, rows)

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._submitted or self._running)
            return not self._closing

    def _admit(self) -> None:
        while self._prefix_cache and self._submitted:
            sequence = self._submitted.popleft()
            sequence.slot, sequence.reused = self._prefix_cache.acquire(sequence.cache_scope, sequence.prompt_ids)
            sequence.position = sequence.reused
            self._running.append(sequence)

    def _drop_cancelled(self) -> None:
        for sequence in [sequence for sequence in self._running if sequence.cancelled]:
            self._end(sequence, FinishReason.CANCELLED)

    def _prefill_chunk(self) -> int:
        """Prefill one chunk of one prompt, so that a long prompt delays neither a cancel nor the others by more."""
        sequence = next((sequence for sequence in self._running if sequence.prefilling), None)
        if sequence is None:
            return 0
        chunk = sequence.prompt_ids[sequence.position :][: self._prefill_chunk_tokens]
        try:
            tokens = self._step_runner.prefill(sequence, chunk)
        except Exception as error:
            self._fail(sequence, error)
            return 0
        sequence.position += len(chunk)
        if not sequence.prefilling:
            self._enqueue([sequence], tokens)
        return len(chunk)

    def _decode_step(self) -> int:
        """One token more for every sequence that has its first."""
        rows = [sequence for sequence in self._running if sequence.decoding]
        if not rows:
            self._collect(all_but=0)
            return 0
        try:
            tokens = self._step_runner.decode(rows)
        except Exception as error:
            for sequence in rows:
                self._fail(sequence, error)
            return 0
        for sequence in rows:
            sequence.position += 1
        self._enqueue(rows, tokens)
        return len(rows)

    def _enqueue(self, rows: list[Sequence], tokens: Iterable[TokenOrError]) -> None:
        """Hand on each row's token, later if the model may compute the next step meanwhile."""
        for sequence in rows:
            sequence.requested += 1
        self._in_flight.append((rows, tokens))
        self._collect(all_but=self._step_runner.lookahead)

    def _collect(self, *, all_but: int) -> None:
        """Read the tokens of the steps under way, the oldest first, and leave the last `all_but` of them."""
        while len(self._in_flight) > all_but:
            rows, tokens = self._in_flight.popleft()
            try:
                for sequence, token in zip(rows, tokens, strict=True):
                    self._emit(sequence, token)
            except Exception as error:  # the device's: nothing of this step can be had
                for sequence in rows:
                    self._fail(sequence, error)

    def _emit(self, sequence: Sequence, token: TokenOrError) -> None:
        """Hand a token to the listener, unless the sequence has ended since it was asked for."""
        if sequence not in self._running:
            return
        if isinstance(token, Exception):
            self._fail(sequence, token)
            return
        try:
            sequence.output_ids.append(token)
            if token in self._eos_ids:
                self._end(sequence, FinishReason.END_OF_SEQUENCE)
            elif sequence.listener.on_token(token):
                self._end(sequence, FinishReason.STOP_SEQUENCE)
            elif len(sequence.output_ids) == sequence.params.max_tokens:
                self._end(sequence, FinishReason.MAX_TOKENS)
        except Exception as error:
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        if sequence not in self._running:
            return
        sequence.context.run(logger.error, "a sequence failed in the engine", exc_info=error)
        self._end(sequence, FinishReason.FAILED)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
            self._prefix_cache.release(sequence.slot, sequence.cache_scope, self._reusable(sequence, reason))
        reused = min(sequence.reused, sequence.input_tokens)
        sequence.listener.on_finish(SequenceResult(reason, sequence.input_tokens, len(sequence.output_ids), reused))

    def _reusable(self, sequence: Sequence, reason: FinishReason) -> list[int]:
        """The tokens in the KV cache that a later prompt may build on."""
        if reason is FinishReason.FAILED:  # what a failed step has left is not to be trusted
            return []
        ids = [*sequence.prompt_ids, *sequence.output_ids] if self._model.chunk_invariant else sequence.prompt_ids
        return ids[: sequence.position]
