"""One reply in the making: it waits for its slot, runs in the engine, and keeps its text for all who read it.

It is a task of its own, beside the calls that read it, so that a reader who reads nothing never holds the slot, and the
slot is free as soon as the engine has let go, not before.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

from llama2_server.admission.accounts import Account
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason, Sequence, SequenceResult
from llama2_server.engine.text.detokenizer import Detokenizer
from llama2_server.engine.text.stop_sequences import StopMatcher
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.errors import EngineUnavailable, InternalError, ServiceError, ShuttingDown
from llama2_server.generation.prompt import Prompt
from llama2_server.generation.supervised_engine import SupervisedEngine
from llama2_server.telemetry.call import GenerationTimes
from llama2_server.usage.pricing import TokenUsage

logger = logging.getLogger(__name__)

Progress = Callable[[TokenUsage], None]


class Generation:
    """One reply; `start` it, let any number of readers take its `deltas`, and `leave` when the last one has gone.

    Times are by time.monotonic, and 0 until they have come.
    """

    def __init__(self, prompt: Prompt, params: GenerationParams, tokenizer: Tokenizer, on_progress: Progress) -> None:
        """`on_progress` hears of each token, on the engine's thread, and must be quick."""
        self.params = params
        self.finish_reason: FinishReason | None = None
        """Why the reply ended; None until it has, and for one that was refused, failed or was given up."""
        self.counts = TokenUsage(0, 0)
        """What was computed, whatever the end."""
        self.reused_input_tokens = 0
        """Those of the input tokens that the engine still held."""
        self.queued_at = 0.0
        self.admitted_at = 0.0
        self._prompt = prompt
        self._text = _TextStream(
            self, tokenizer, params, len(prompt.token_ids), on_progress, keep_leading_space=prompt.raw
        )
        self._deltas: list[str] = []
        self._news = asyncio.Event()
        self._error: ServiceError | None = None
        self._finished: asyncio.Future[SequenceResult] = asyncio.get_running_loop().create_future()
        self._sequence: Sequence | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def complete(self) -> bool:
        """Whether the whole reply is there."""
        return self.finish_reason is not None

    @property
    def failed(self) -> bool:
        """Whether it was refused, failed or was given up."""
        return self._error is not None

    @property
    def text(self) -> str:
        """The reply so far."""
        return "".join(self._deltas)

    @property
    def first_token_at(self) -> float:
        """When the first token was computed."""
        return self._text.first_token_at

    @property
    def finished_at(self) -> float:
        """When the last token was computed."""
        return self._text.finished_at

    @property
    def times(self) -> GenerationTimes:
        """When it got how far, for telemetry."""
        return GenerationTimes(self.queued_at, self.admitted_at, self.first_token_at, self.finished_at)

    def start(
        self, slots: RequestQueue, engine: SupervisedEngine, account: Account | None, deadline: float | None
    ) -> None:
        """Begin to wait for a slot; deadline by the loop's clock, or None.

        Without an account nobody owns what it leaves in the KV cache, and it builds on nothing that is there.
        """
        self.queued_at = time.monotonic()
        self._task = asyncio.create_task(self._run(slots, engine, account, deadline))

    def leave(self) -> None:
        """Nobody reads any more: leave the line, or stop the engine within one step; nothing happens after the end."""
        if self._sequence is not None:
            self._sequence.cancel()
        elif self._task is not None:
            self._task.cancel()

    async def ended(self) -> None:
        """Wait for its end, whichever it is; the slot is free then."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def deltas(self) -> AsyncIterator[str]:
        """The reply's text from its beginning, as it comes; a slow reader gets fewer, longer deltas.

        Raises:
            ServiceError: the generation was refused or failed.
        """
        read = 0
        while True:
            news = self._news
            if read < len(self._deltas):
                text = "".join(self._deltas[read:])
                read = len(self._deltas)
                yield text
            elif self._error is not None:
                raise self._error
            elif self.complete:
                return
            else:
                await news.wait()

    def add_text(self, text: str) -> None:
        """Take a delta; called on the event loop."""
        self._deltas.append(text)
        self._announce()

    def finish(self, finish: SequenceResult) -> None:
        """Take the engine's last word; called on the event loop."""
        if not self._finished.done():
            self._finished.set_result(finish)

    async def _run(
        self, slots: RequestQueue, engine: SupervisedEngine, account: Account | None, deadline: float | None
    ) -> None:
        owner = None if account is None else account.id
        try:
            async with slots.acquire(owner or "", deadline):
                self.admitted_at = time.monotonic()
                finish = await self._compute(engine, owner)
            self._judge(finish)
        except ServiceError as error:
            self._error = error
        except asyncio.CancelledError:
            self._error = ShuttingDown("the call was given up")
            raise
        except Exception:  # or its readers would wait for ever
            logger.exception("a generation failed")
            self._error = InternalError()
        finally:
            self._announce()

    async def _compute(self, engine: SupervisedEngine, owner: str | None) -> SequenceResult:
        sequence = self._sequence = engine.submit(self._prompt.token_ids, self.params, self._text, owner)
        try:
            return await engine.outcome(self._finished)
        except EngineUnavailable:
            # What was computed is paid for; nobody can tell any more than this.
            self.counts = TokenUsage(sequence.input_tokens, len(sequence.output_ids))
            raise

    def _judge(self, finish: SequenceResult) -> None:
        self.counts = TokenUsage(finish.input_tokens, finish.output_tokens)
        self.reused_input_tokens = finish.reused_input_tokens
        if finish.reason is FinishReason.FAILED:
            self._error = InternalError()
        elif finish.reason is FinishReason.CANCELLED:
            self._error = ShuttingDown("the server shut down before the reply was complete; try again")
        else:
            self.finish_reason = FinishReason.STOP_SEQUENCE if self._text.stopped else finish.reason

    def _announce(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class _TextStream:
    """Turns tokens into text on the engine's thread, cuts it at stop sequences, and posts it to the event loop."""

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        params: GenerationParams,
        input_tokens: int,
        on_progress: Progress,
        *,
        keep_leading_space: bool,
    ) -> None:
        self._generation = generation
        self._loop = asyncio.get_running_loop()
        self._detokenizer = Detokenizer(tokenizer, keep_leading_space)
        self._stops = StopMatcher(params.stop)
        self._input_tokens = input_tokens
        self._output_tokens = 0
        self._on_progress = on_progress
        self._posted: deque[str] = deque()
        self._called = False
        self.first_token_at = 0.0
        self.finished_at = 0.0

    @property
    def stopped(self) -> bool:
        """Whether a stop sequence was completed."""
        return self._stops.matched

    def on_token(self, token_id: int) -> bool:
        self.first_token_at = self.first_token_at or time.monotonic()
        self._output_tokens += 1
        self._on_progress(TokenUsage(self._input_tokens, self._output_tokens))
        self._post(self._stops.push(self._detokenizer.decode(token_id)))
        return self._stops.matched

    def on_finish(self, finish: SequenceResult) -> None:
        self.finished_at = time.monotonic()
        self.first_token_at = self.first_token_at or self.finished_at  # the first token was the end of the sequence
        if not self._stops.matched:
            self._post(self._stops.push(self._detokenizer.flush()))
            self._post(self._stops.flush())
        self._loop.call_soon_threadsafe(self._generation.finish, finish)

    def _post(self, text: str) -> None:
        if not text:
            return
        self._posted.append(text)
        # A loop that has yet to come takes this one along: waking it costs more than a token's text.
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        """On the event loop: hand over what has been posted."""
        self._called = False  # first: who posts from now on calls again
        texts = []
        while self._posted:
            texts.append(self._posted.popleft())
        if texts:
            self._generation.add_text("".join(texts))
