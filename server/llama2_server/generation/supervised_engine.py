"""The engine under supervision: the results of its sequences, and whether its steps return."""

import asyncio
import contextlib
import logging
import time
from asyncio import FIRST_COMPLETED
from collections.abc import Callable, Hashable
from collections.abc import Sequence as SequenceOf

from llama2_server.engine.engine import Engine
from llama2_server.engine.errors import EngineError
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, Sequence, SequenceListener, SequenceResult
from llama2_server.engine.step_runner import StepKind
from llama2_server.errors import EngineUnavailable, InternalError

logger = logging.getLogger(__name__)

POLL_INTERVAL_SECONDS = 1.0  # between two checks of an engine that runs no step
# A result follows the end of its sequence within one turn of the event loop. Polls count the loop's own time: after a
# pause of the whole process, a result that is on its way still arrives first.
RESULT_POLL_SECONDS = 0.5
MISSING_POLLS = 4


class SupervisedEngine:
    """The engine as generations use it. It has failed if a step hangs, its thread has died, or a slot is lost.

    A thread that hangs in a kernel or a driver cannot be stopped: only the end of the process ends it.

    Args:
        engine: the one engine of this process.
        engine_step_timeout_seconds: a step that takes longer counts as hung.
        on_outcome: is called with True for each sequence that succeeds and False for each that fails, on the event
            loop; not for a cancelled one, and not for one whose request failed without a fault of the device.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        engine_step_timeout_seconds: float,
        on_outcome: Callable[[bool], None] = lambda succeeded: None,
    ) -> None:
        self._engine = engine
        self._step_timeout_seconds = engine_step_timeout_seconds
        self._on_outcome = on_outcome
        self._failed = asyncio.Event()

    @property
    def step_kind(self) -> StepKind:
        """How the engine computes its steps."""
        return self._engine.step_kind

    @property
    def failed(self) -> bool:
        """Whether this process can no longer compute."""
        return self._failed.is_set()

    @property
    def alive(self) -> bool:
        """Whether it still accepts sequences."""
        return not self.failed and self._engine.alive

    def submit(
        self,
        prompt_ids: SequenceOf[int],
        params: GenerationParams,
        listener: SequenceListener,
        cache_scope: Hashable | None,
    ) -> Sequence:
        """Queue a sequence, as `Engine.submit` does.

        Raises:
            EngineUnavailable: the engine has stopped or failed.
        """
        try:
            if self.failed:
                raise _unavailable()
            return self._engine.submit(prompt_ids, params, listener, cache_scope)
        except EngineError as error:
            raise _unavailable() from error

    async def result(self, sequence: Sequence, finished: "asyncio.Future[SequenceResult]") -> SequenceResult:
        """Wait for the result of a submitted sequence, which sets `finished`; its slot in the engine is free then.

        Raises:
            EngineUnavailable: the engine failed first.
            InternalError: the sequence has ended without a result.
        """
        failed = asyncio.create_task(self._failed.wait())
        missing = 0
        try:
            while missing < MISSING_POLLS and not finished.done() and not self.failed:
                await asyncio.wait((finished, failed), timeout=RESULT_POLL_SECONDS, return_when=FIRST_COMPLETED)
                missing = missing + 1 if sequence.ended or self._engine.stopped else 0
        finally:
            failed.cancel()
        if self.failed and not finished.done():
            raise _unavailable()
        return self._checked_result(sequence, finished)

    def _checked_result(self, sequence: Sequence, finished: "asyncio.Future[SequenceResult]") -> SequenceResult:
        """Return the result; without the slot of its sequence the engine has failed, because no request gets it."""
        if not finished.done() and self._engine.stopped:
            self.fail("the engine thread died")
        elif sequence.holds_slot:
            self.fail("the engine did not release a KV cache slot")
        if not finished.done():
            logger.critical("a sequence ended without a result; its request fails")
            self._on_outcome(False)
            raise _unavailable() if self.failed else InternalError
        result = finished.result()
        if result.reason is not FinishReason.CANCELLED and not sequence.request_error:
            self._on_outcome(result.reason is not FinishReason.FAILED)
        return result

    def fail(self, reason: str) -> None:
        """Declare that the engine has failed; the process must end."""
        logger.critical(reason)
        self._failed.set()

    async def wait_until_failed(self) -> None:
        """Wait until the engine has failed; then each pending `result` raises EngineUnavailable."""
        while not self.failed and not self._has_failed():
            seconds = POLL_INTERVAL_SECONDS
            if (deadline := self._step_deadline()) is not None:
                seconds = min(max(deadline - time.monotonic(), 0.0), seconds)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._failed.wait()
        self._failed.set()

    async def close(self, timeout_seconds: float) -> None:
        """Cancel all sequences and end the engine's thread; the engine has failed if a step outlasts the timeout."""
        if not await asyncio.to_thread(self._engine.close, 0 if self.failed else timeout_seconds):
            if timeout_seconds > 0:
                logger.warning(
                    "the engine's last step did not end within %.0f s; continuing without it", timeout_seconds
                )
            self._failed.set()

    def _has_failed(self) -> bool:
        deadline = self._step_deadline()
        if deadline is not None and time.monotonic() >= deadline:
            logger.critical(
                "an engine step did not end within --engine-step-timeout-seconds (%.0f s)", self._step_timeout_seconds
            )
            return True
        if not self._engine.alive:
            logger.critical("the engine thread died")
            return True
        return False

    def _step_deadline(self) -> float | None:
        """Return until when the running step may take, by the monotonic clock; None between two steps."""
        started_at = self._engine.step_started_at
        return None if started_at is None else started_at + self._step_timeout_seconds


def _unavailable() -> EngineUnavailable:
    return EngineUnavailable("the engine has stopped; retry, on another server if there is one")
