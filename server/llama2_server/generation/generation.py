"""One reply in progress: it waits for its slot, runs in the engine, and keeps its text for every reader.

It runs in a dedicated task, separate from the calls that read it. So a client that does not read never holds the slot,
and the slot is free as soon as the engine has released it, not earlier.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

from llama2_server.admission.request_queue import RequestQueue
from llama2_server.admission.reservation import Reservation, SlotLease
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, Sequence, SequenceResult
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.errors import EngineUnavailable, InternalError, ServiceError, ShuttingDown
from llama2_server.generation.prompt import Prompt
from llama2_server.generation.replicas.leases import ReplyEnd
from llama2_server.generation.replicas.reply_text import ReplyText
from llama2_server.generation.replicas.shared_reply import SharedReply
from llama2_server.generation.supervised_engine import SupervisedEngine
from llama2_server.generation.text_stream import OnProgress, TextStream
from llama2_server.telemetry.call import GenerationTimes
from llama2_server.usage.pricing import ZERO_TOKENS, TokenUsage

logger = logging.getLogger(__name__)


class Generation:
    """One reply. `start` it, read its `deltas` with any number of readers, and `cancel` it after the last reader.

    Times are from time.monotonic; 0 for an event that has not happened.
    """

    def __init__(
        self,
        prompt: Prompt,
        params: GenerationParams,
        tokenizer: Tokenizer,
        on_progress: OnProgress,
        shared: SharedReply | None = None,
    ) -> None:
        """`on_progress` is called for each token on the engine's thread, and must return quickly.

        With `shared`, other replicas read the reply, or this one reads it from them.
        """
        self.params = params
        self.finish_reason: FinishReason | None = None
        """Why the reply ended; None before, and if the generation was rejected, failed or was cancelled."""
        self.tokens = ZERO_TOKENS
        """The computed tokens, however the generation ends."""
        self.reused_input_tokens = 0
        """Input tokens reused from the KV cache."""
        self._unread = False
        self._lease: SlotLease | None = None
        self.queued_at = self.admitted_at = self._ended_at = 0.0
        self._prompt = prompt
        self.reply_text = ReplyText()
        self._shared = shared
        self.on_remote_readers: list[Callable[[], None]] = []
        """Called when the first reader on another replica has come, and when the last one has left."""
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
        if self._shared is not None:
            self.reply_text.notify()  # so that its lease ends now

    @property
    def joined(self) -> bool:
        """Whether another replica computes the reply, or computed its start; its tokens are then free."""
        return self._shared is not None and self._shared.joined

    @property
    def read_elsewhere(self) -> bool:
        """Whether other replicas read it, as known half a second ago."""
        return self._shared is not None and self._shared.remote_readers > 0

    @property
    def end(self) -> ReplyEnd | None:
        """The end of a complete reply."""
        if self.finish_reason is None:
            return None
        return ReplyEnd(self.finish_reason, self.tokens.input_tokens, self.tokens.output_tokens)

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
        return self.reply_text.value

    @property
    def first_token_at(self) -> float:
        """When the first token was computed, or its text arrived from another replica."""
        return self.reply_text.first_at if self.joined or self._text is None else self._text.first_token_at

    @property
    def finished_at(self) -> float:
        """When the last token was computed, or the end arrived from another replica."""
        return self._ended_at if self.joined or self._text is None else self._text.finished_at

    @property
    def times(self) -> GenerationTimes:
        """The start and the end of each phase, for telemetry."""
        return GenerationTimes(self.queued_at, self.admitted_at, self.first_token_at, self.finished_at)

    def start(
        self,
        queue: RequestQueue,
        reservation: Reservation | None,
        engine: SupervisedEngine,
        account_id: str | None,
        deadline: float | None,
    ) -> None:
        """Start the task, which waits for the slot of a confirmed reservation, and in the end releases it.

        Without a reservation, the task reads the reply from another replica, and enters the queue if that one is lost.
        The wait ends at the deadline, a time of the event loop's clock, or None.
        Without an account the generation neither reuses the KV cache nor leaves anything in it.
        """
        self.queued_at = time.monotonic()
        self._task = asyncio.create_task(self._run(queue, reservation, deadline, engine, account_id))
        if reservation is not None:
            # A task that is cancelled before its first step does not run at all.
            self._task.add_done_callback(lambda _: queue.release(reservation))

    def cancel(self) -> None:
        """Cancel the generation, unless another replica reads it. No-op once finished."""
        if self._shared is None:
            self.stop()
        else:
            self.unread = False
            self._shared.cancel(self)

    def stop(self) -> None:
        """Leave the queue, or stop within one decode step. No-op once finished."""
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
            changed = self.reply_text.changed
            text, read = self.reply_text.after(read)
            if text:
                yield text
            elif self._error is not None:
                raise self._error
            elif self.complete:
                return
            else:
                await changed.wait()

    def add_text(self, text: str) -> None:
        """Add text; fail if it repeats the known text with a difference."""
        if self._error is None and not self.reply_text.add(text):
            self._fail_repetition()

    def _fail_repetition(self) -> None:
        logger.error("a reply was computed again with another text, so its call fails")
        if self._shared is not None:
            self._shared.count_failure()
        self._error = EngineUnavailable("the reply could not be continued after the loss of a server; retry")
        if self._sequence is not None:
            self._sequence.cancel()

    def _set_finished(self, result: SequenceResult) -> None:
        if not self._finished.done():
            self._finished.set_result(result)

    async def _run(
        self,
        queue: RequestQueue,
        reservation: Reservation | None,
        deadline: float | None,
        engine: SupervisedEngine,
        account_id: str | None,
    ) -> None:
        try:
            while reservation is not None or not await self._follow(engine):
                entered, reservation = reservation or queue.enter(account_id or "", deadline), None
                async with queue.slot(entered, deadline) as self._lease:
                    self._lease.yields = self._unread
                    if self._shared is None or await self._shared.claim(self):
                        await self._compute(engine, account_id)
                        return
                    self._lease.unused = True
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
            self.reply_text.notify()

    async def _follow(self, engine: SupervisedEngine) -> bool:
        """Read the reply from the replica that computes it; return False if this server must compute it."""
        if self._shared is None:
            return False
        self.admitted_at = self.admitted_at or time.monotonic()
        return self._end_as(await self._shared.follow(self, lambda: engine.alive)) or self.failed

    async def _compute(self, engine: SupervisedEngine, account_id: str | None) -> None:
        self.admitted_at = self.admitted_at or time.monotonic()
        if self._shared is not None and self._end_as(await self._shared.take_stored(self)):
            return
        self._text = self._text_stream()
        self._sequence = engine.submit(self._prompt.token_ids, self.params, self._text, account_id)
        result = await engine.result(self._sequence, self._finished)
        self._set_result(result, stopped=self._text.stopped)

    def _end_as(self, end: ReplyEnd | None) -> bool:
        """End as the reply of another replica; return False without an end."""
        if end is None:
            return False
        self.tokens = TokenUsage(end.input_tokens, end.output_tokens)
        self._complete(end.finish_reason)
        return True

    def _text_stream(self) -> TextStream:
        return TextStream(
            self._tokenizer,
            self.params.stop,
            len(self._prompt.token_ids),
            keep_leading_space=self._prompt.raw,
            on_progress=(lambda tokens: None) if self.joined else self._on_progress,
            on_text=self.add_text,
            on_finish=self._set_finished,
        )

    def _set_result(self, result: SequenceResult, *, stopped: bool) -> None:
        self.tokens = TokenUsage(result.input_tokens, result.output_tokens)
        self.reused_input_tokens = result.reused_input_tokens
        if result.reason is FinishReason.FAILED:
            self._error = InternalError()
        elif result.reason is FinishReason.CANCELLED:
            message = "the server shut down before the reply was complete; retry"
            self._error = self._error or ShuttingDown(message, refunds_quota=result.input_tokens == 0)
        else:
            self._complete(FinishReason.STOP_SEQUENCE if stopped else result.reason)

    def _complete(self, reason: FinishReason) -> None:
        self._ended_at = time.monotonic()
        if self._error is None and self.reply_text.repeats:  # it ends before the text that readers have
            self._fail_repetition()
        elif self._error is None:
            self.finish_reason = reason
