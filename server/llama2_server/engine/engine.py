"""The engine: one thread that owns the model and its KV cache, and works on token ids only.

The thread runs a step loop over a fixed number of slots (continuous batching, Yu et al. 2022, Orca). Sequences join and
leave between steps, and all decoding sequences share each decode step. A cancelled sequence leaves before the next
step. The engine never waits for a reader of its tokens.

If the device samples the tokens, the engine computes one step ahead of the tokens that it reads
(StepRunner.lookahead). It drops tokens computed for a sequence that has ended.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as SequenceOf

import torch

from llama2_server.engine.errors import EngineError, SequenceError
from llama2_server.engine.model.interface import Model
from llama2_server.engine.prefix_cache import PrefixCache
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, Sequence, SequenceListener, SequenceResult
from llama2_server.engine.step_runner import StepKind, StepRunner, TokenOrError, host_step_runner

logger = logging.getLogger(__name__)


class Engine:
    """Runs sequences on a model; `submit` and `close` are safe from any thread.

    Args:
        model: the model and its KV cache, which only the engine may use from now on.
        eos_ids: token ids that end a sequence.
        prefill_chunk_tokens: maximum number of prompt tokens per step; by default the model's own value.
        on_step: called after each step with "prefill" or "decode", its duration in seconds, and the number of prompt
            tokens or of rows. It runs on the engine's thread and must be quick.
        step_runner: computes the steps; by default with sampling on the host.
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
        self._step_runner = step_runner or host_step_runner(model)
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
            self._admit()
            self._drop_cancelled()
            self._timed("prefill", self._prefill_chunk)
            self._drop_cancelled()
            self._timed("decode", self._decode_step)
            self._step_started_at = None
        for sequence in [*self._running, *self._submitted]:
            self._end(sequence, FinishReason.CANCELLED)

    def _timed(self, phase: str, step: Callable[[], int]) -> None:
        # Sampling waits for the device, so the duration includes work that the device does asynchronously.
        started_at = time.perf_counter()
        rows = step()
        if rows:
            self._on_step(phase, time.perf_counter() - started_at, rows)

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._submitted or self._running)
            return not self._closing

    def _admit(self) -> None:
        while self._prefix_cache.has_free_slot and self._submitted:
            sequence = self._submitted.popleft()
            sequence.slot, sequence.reused = self._prefix_cache.acquire(sequence.cache_scope, sequence.prompt_ids)
            sequence.holds_slot = True
            sequence.position = sequence.reused
            self._running.append(sequence)

    def _drop_cancelled(self) -> None:
        for sequence in [sequence for sequence in self._running if sequence.cancelled]:
            self._end(sequence, FinishReason.CANCELLED)

    def _prefill_chunk(self) -> int:
        """Prefill one chunk of one prompt and return its number of tokens.

        A long prompt therefore delays a cancellation and the other sequences by one chunk at most.
        """
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
        """Compute one token for each decoding sequence and return the number of rows."""
        rows = [sequence for sequence in self._running if sequence.decoding]
        if not rows:
            self._collect(max_in_flight=0)
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
                    self._emit(sequence, token)
            except Exception as error:  # a device error: no token of this step is available
                for sequence in rows:
                    self._fail(sequence, error)

    def _emit(self, sequence: Sequence, token: TokenOrError) -> None:
        """Pass a token to the listener, unless the sequence has ended since the token was requested."""
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
        sequence.request_error = _is_request_error(error)
        sequence.context.run(logger.error, "sequence failed in the engine", exc_info=error)
        self._end(sequence, FinishReason.FAILED)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, whatever fails: the engine's thread must live, and the other sequences must continue."""
        sequence.ended = True
        if sequence in self._running:
            self._running.remove(sequence)
            self._release_slot(sequence, reason)
        reused = min(sequence.reused, sequence.input_tokens)
        result = SequenceResult(reason, sequence.input_tokens, len(sequence.output_ids), reused)
        try:
            sequence.listener.on_finish(result)
        except Exception as error:  # the supervision notices that the result is missing
            sequence.context.run(logger.error, "a sequence's result could not be delivered", exc_info=error)

    def _release_slot(self, sequence: Sequence, reason: FinishReason) -> None:
        """Free the sequence's slot, without its prefix if that fails; on another failure `holds_slot` stays True."""
        for cached in (reason, FinishReason.FAILED):  # without its prefix in the second attempt
            try:
                reusable = self._reusable(sequence, cached)
                self._prefix_cache.release(sequence.slot, sequence.cache_scope, reusable)
            except Exception as error:  # the next sequence needs the slot more than the prefix
                sequence.context.run(logger.error, "a KV cache slot could not be released", exc_info=error)
            else:
                sequence.holds_slot = False
                return

    def _reusable(self, sequence: Sequence, reason: FinishReason) -> list[int]:
        """Return the token ids in the KV cache that a later prompt may reuse."""
        if reason is FinishReason.FAILED:  # a failed step can leave wrong keys and values
            return []
        ids = [*sequence.prompt_ids, *sequence.output_ids] if self._model.chunk_invariant else sequence.prompt_ids
        return ids[: sequence.position]


def _is_request_error(error: Exception) -> bool:
    if isinstance(error, SequenceError | torch.OutOfMemoryError | MemoryError):
        return True
    # On a CPU, torch has no class for it.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
