"""One reply in progress: it waits for its slot, runs in the engine, and keeps its text for every reader.

It runs in a dedicated task, separate from the calls that read it. So a client that does not read never holds the slot,
and the slot is free as soon as the engine has released it, not earlier.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from llama2_server.admission.request_queue import RequestQueue
from llama2_server.admission.reservation import Reservation, SlotLease
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, Sequence, SequenceResult
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.errors import InternalError, ServiceError, ShuttingDown
from llama2_server.generation.prompt import Prompt
from llama2_server.generation.supervised_engine import SupervisedEngine
from llama2_server.generation.text_stream import OnProgress, TextStream
from llama2_server.telemetry.call import GenerationTimes
from llama2_server.usage.pricing import ZERO_TOKENS, TokenUsage

logger = logging.getLogger(__name__)


class Generation:
    """One reply. `start` it, read its `deltas` with any number of readers, and `cancel` it after the last reader.

    Times are from time.monotonic; 0 for an event that has not happened.
    """

    def __init__(self, prompt: Prompt, params: GenerationParams, tokenizer: Tokenizer, on_progress: OnProgress) -> None:
        """`on_progress` is called for each token on the engine's thread, and must return quickly."""
        self.params = params
        self.finish_reason: FinishReason | None = None
        """Why the reply ended; None before, and if the generation was rejected, failed or was cancelled."""
        self.tokens = ZERO_TOKENS
        """The computed tokens, however the generation ends."""
        self.reused_input_tokens = 0
        """Input tokens reused from the KV cache."""
        self._unread = False
        self._lease: SlotLease | None = None
        self.queued_at = 0.0
        self.admitted_at = 0.0
        self._prompt = prompt
        self._deltas: list[str] = []
        self._changed = asyncio.Event()
        self._error: ServiceError | None = None
        self._finished: asyncio.Future[SequenceResult] = asyncio.get_running_loop().create_future()
        self._sequence: Sequence | None = None
        self._task: asyncio.Task[None] | None = None
        self._tokenizer = tokenizer
        self._on_progress = on_progress
        self._text: TextStream | None = None

    @property
    def unread(self) -> bool:
        """Whether it continues without a reader, until one returns; other requests then do not share it."""
        return self._unread

    @unread.setter
    def unread(self, unread: bool) -> None:
        self._unread = unread
        if self._lease is not None:
            self._lease.yields = unread

    @property
    def complete(self) -> bool:
        """Whether the whole reply is available."""
        return self.finish_reason is not None

    @property
    def failed(self) -> bool:
        """Whether the generation was rejected, failed or was cancelled."""
        return self._error is not None

    @property
    def done(self) -> bool:
        """Whether the generation has ended, however it ended; its slot is free then."""
        return self._task is None or self._task.done()

    @property
    def computed_tokens(self) -> TokenUsage:
        """The tokens computed so far; the exact count is known at the end."""
        if self._sequence is None:
            return self.tokens
        return TokenUsage(self._sequence.input_tokens, len(self._sequence.output_ids))

    @property
    def text(self) -> str:
        """The reply so far."""
        return "".join(self._deltas)

    @property
    def first_token_at(self) -> float:
        """When the first token was computed."""
        return 0.0 if self._text is None else self._text.first_token_at

    @property
    def finished_at(self) -> float:
        """When the last token was computed."""
        return 0.0 if self._text is None else self._text.finished_at

    @property
    def times(self) -> GenerationTimes:
        """The start and the end of each phase, for telemetry."""
        return GenerationTimes(self.queued_at, self.admitted_at, self.first_token_at, self.finished_at)

    def start(
        self,
        queue: RequestQueue,
        reservation: Reservation,
        engine: SupervisedEngine,
        account_id: str | None,
        deadline: float | None,
    ) -> None:
        """Start the task, which waits for the slot of a confirmed reservation, and in the end releases it.

        The wait ends at the deadline, a time of the event loop's clock, or None.
        Without an account the generation neither reuses the KV cache nor leaves anything in it.
        """
        self.queued_at = time.monotonic()
        self._task = asyncio.create_task(self._run(queue.slot(reservation, deadline), engine, account_id))
        # A task that is cancelled before its first step does not run at all.
        self._task.add_done_callback(lambda _: queue.release(reservation))

    def cancel(self) -> None:
        """Cancel the generation: leave the queue, or stop within one decode step. No-op once finished."""
        if self._sequence is not None:
            self._sequence.cancel()
        elif self._task is not None:
            self._task.cancel()

    async def wait(self) -> None:
        """Wait until the generation has ended, however it ends; its slot is free then."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def deltas(self) -> AsyncIterator[str]:
        """Yield the reply's text from its start, while it is generated; a slow reader gets fewer, longer deltas.

        Raises:
            ServiceError: the generation was rejected, failed or was cancelled.
        """
        read = 0
        while True:
            changed = self._changed
            if read < len(self._deltas):
                text = "".join(self._deltas[read:])
                read = len(self._deltas)
                yield text
            elif self._error is not None:
                raise self._error
            elif self.complete:
                return
            else:
                await changed.wait()

    def _add_text(self, text: str) -> None:
        self._deltas.append(text)
        self._notify()

    def _set_finished(self, result: SequenceResult) -> None:
        if not self._finished.done():
            self._finished.set_result(result)

    async def _run(
        self, slot: AbstractAsyncContextManager[SlotLease], engine: SupervisedEngine, account_id: str | None
    ) -> None:
        try:
            async with slot as self._lease:
                self.admitted_at = time.monotonic()
                self._text = self._text_stream()
                self._sequence = engine.submit(self._prompt.token_ids, self.params, self._text, account_id)
                result = await engine.result(self._sequence, self._finished)
            self._set_result(result, stopped=self._text.stopped)
        except ServiceError as error:
            self.tokens = self.computed_tokens  # they are billed
            self._error = error
        except asyncio.CancelledError:
            self._error = ShuttingDown("the call was cancelled")
            raise
        except Exception:  # otherwise readers would wait forever
            logger.exception("a generation failed")
            self._error = InternalError()
        finally:
            self._notify()

    def _text_stream(self) -> TextStream:
        return TextStream(
            self._tokenizer,
            self.params.stop,
            len(self._prompt.token_ids),
            keep_leading_space=self._prompt.raw,
            on_progress=self._on_progress,
            on_text=self._add_text,
            on_finish=self._set_finished,
        )

    def _set_result(self, result: SequenceResult, *, stopped: bool) -> None:
        self.tokens = TokenUsage(result.input_tokens, result.output_tokens)
        self.reused_input_tokens = result.reused_input_tokens
        if result.reason is FinishReason.FAILED:
            self._error = InternalError()
        elif result.reason is FinishReason.CANCELLED:
            message = "the server shut down before the reply was complete; retry"
            self._error = ShuttingDown(message, refunds_quota=result.input_tokens == 0)
        else:
            self.finish_reason = FinishReason.STOP_SEQUENCE if stopped else result.reason

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
