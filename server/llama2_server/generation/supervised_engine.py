"""The engine under watch: how its generations end, and whether it comes back from its steps."""

import asyncio
import logging
import time
from collections.abc import Callable, Hashable
from collections.abc import Sequence as SequenceOf

from llama2_server.engine.engine import Engine
from llama2_server.engine.errors import EngineError
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, Sequence, SequenceListener, SequenceResult
from llama2_server.errors import EngineUnavailable

logger = logging.getLogger(__name__)

POLL_INTERVAL_SECONDS = 1.0  # how often an engine is looked at that is between steps


class SupervisedEngine:
    """The engine as generations use it; lost is an engine that hangs in a step, or whose thread has died.

    A thread that hangs in a kernel or a driver cannot be stopped: only the end of the process ends it.

    Args:
        engine: the one engine of this process.
        engine_step_timeout_seconds: a step that takes longer does not end any more.
        on_outcome: hears of every sequence that ended by itself, True if it worked; called on the event loop.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        engine_step_timeout_seconds: float,
        on_outcome: Callable[[bool], None] = lambda worked: None,
    ) -> None:
        self._engine = engine
        self._step_timeout_seconds = engine_step_timeout_seconds
        self._on_outcome = on_outcome
        self._lost = asyncio.Event()

    @property
    def lost(self) -> bool:
        """Whether nothing can be computed here any more."""
        return self._lost.is_set()

    def submit(
        self, prompt_ids: SequenceOf[int], params: GenerationParams, listener: SequenceListener, owner: Hashable | None
    ) -> Sequence:
        """Queue a sequence, as `Engine.submit` does.

        Raises:
            EngineUnavailable: the engine has stopped, or is lost.
        """
        try:
            if self.lost:
                raise _down()
            return self._engine.submit(prompt_ids, params, listener, owner)
        except EngineError as fault:
            raise _down() from fault

    async def outcome(self, finished: "asyncio.Future[SequenceResult]") -> SequenceResult:
        """Wait for the end of a sequence that was submitted, which sets `finished`.

        Raises:
            EngineUnavailable: the engine was lost before.
        """
        lost = asyncio.create_task(self._lost.wait())
        try:
            await asyncio.wait((finished, lost), return_when=asyncio.FIRST_COMPLETED)
        finally:
            lost.cancel()
        if not finished.done():
            raise _down()
        finish = finished.result()
        if finish.reason is not FinishReason.CANCELLED:
            self._on_outcome(finish.reason is not FinishReason.FAILED)
        return finish

    async def watch(self) -> None:
        """Return when the engine is lost; then every outcome that is waited for is EngineUnavailable."""
        while not self._is_lost():
            began = self._engine.step_started_at
            left = POLL_INTERVAL_SECONDS if began is None else began + self._step_timeout_seconds - time.monotonic()
            await asyncio.sleep(min(max(left, 0.0), POLL_INTERVAL_SECONDS))
        self._lost.set()

    async def close(self, timeout_seconds: float) -> None:
        """Cancel what runs and end the engine's thread; one that is still in a step after the timeout is lost."""
        if not await asyncio.to_thread(self._engine.close, 0 if self.lost else timeout_seconds):
            logger.warning("the engine's last step has not ended; nothing waits for it any more")
            self._lost.set()

    def _is_lost(self) -> bool:
        began = self._engine.step_started_at
        if began is not None and time.monotonic() - began >= self._step_timeout_seconds:
            logger.critical(
                "a step of the engine has not ended within engine_step_timeout_seconds (%.0f s)",
                self._step_timeout_seconds,
            )
            return True
        if not self._engine.alive:
            logger.critical("the engine's thread has ended")
            return True
        return False


def _down() -> EngineUnavailable:
    return EngineUnavailable("the engine has stopped; try another server, or this one again when it is back")
