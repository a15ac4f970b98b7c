"""Convert tokens into text on the engine's thread, and deliver it to the event loop."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from llama2_server.engine.sequence import FinishReason, SequenceResult
from llama2_server.engine.text.detokenizer import Detokenizer
from llama2_server.engine.text.stop_sequences import StopMatcher
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.usage.pricing import TokenUsage

logger = logging.getLogger(__name__)

OnProgress = Callable[[TokenUsage], None]


class TextStream:
    """A sequence's listener: decodes its tokens, cuts the text at stop sequences, and delivers it in order.

    Args:
        on_progress: is called for each token on the engine's thread.
        on_text: is called with each piece of text on the event loop.
        on_finish: is called with the sequence's result on the event loop, after the last text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_sequences: tuple[str, ...],
        input_tokens: int,
        *,
        keep_leading_space: bool,
        on_progress: OnProgress,
        on_text: Callable[[str], None],
        on_finish: Callable[[SequenceResult], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._detokenizer = Detokenizer(tokenizer, keep_leading_space)
        self._stop_matcher = StopMatcher(stop_sequences)
        self._input_tokens = input_tokens
        self._output_tokens = 0
        self._on_progress, self._on_text, self._on_finish = on_progress, on_text, on_finish
        self._pending: deque[str] = deque()
        self._flush_scheduled = False
        self.first_token_at = 0.0
        self.finished_at = 0.0

    @property
    def stopped(self) -> bool:
        """Whether a stop sequence was completed."""
        return self._stop_matcher.matched

    def on_token(self, token_id: int) -> bool:
        """Take a token; return whether a stop sequence is complete, so that the sequence must end."""
        self.first_token_at = self.first_token_at or time.monotonic()
        self._output_tokens += 1
        self._on_progress(TokenUsage(self._input_tokens, self._output_tokens))
        self._push(self._stop_matcher.push(self._detokenizer.decode(token_id)))
        return self._stop_matcher.matched

    def on_finish(self, result: SequenceResult) -> None:
        """Take the result, and deliver the text of a complete reply that was held back."""
        self.finished_at = time.monotonic()
        self.first_token_at = self.first_token_at or self.finished_at  # the first token was the end-of-sequence token
        try:
            # A text that breaks off can be continued, so it never ends within a character.
            if result.reason not in (FinishReason.CANCELLED, FinishReason.FAILED) and not self._stop_matcher.matched:
                self._push(self._stop_matcher.push(self._detokenizer.flush()))
                self._push(self._stop_matcher.flush())
        except Exception as error:  # without a result, the call and its slot would wait for it
            logger.error("the last text of a reply failed", exc_info=error)  # noqa: TRY400 - no message: it may quote text
            result = replace(result, reason=FinishReason.FAILED)
        self._loop.call_soon_threadsafe(self._on_finish, result)

    def _push(self, text: str) -> None:
        if not text:
            return
        self._pending.append(text)
        # A scheduled flush takes this text too: waking the event loop costs more than decoding a token.
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False  # first, so that text pushed from now on schedules the next flush
        texts = []
        while self._pending:
            texts.append(self._pending.popleft())
        if texts:
            self._on_text("".join(texts))
