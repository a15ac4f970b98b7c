"""Retries by the client itself: waiting for the quota, and continuing a stream that broke off.

gRPC retries calls that fail before their first message; see `channel.service_config`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from llama2.v1 import text_generation_pb2
from llama2_client.errors import InternalError, Llama2Error, QuotaExceeded, Unavailable
from llama2_client.reply import Reply
from llama2_client.settings import ClientSettings


class Attempts:
    """The time that the attempts of one call may take.

    Args:
        settings: the client's settings.
        timeout: the call's own timeout in seconds; None for the client's.
    """

    def __init__(self, settings: ClientSettings, timeout: float | None) -> None:
        allowed = settings.deadline_seconds(timeout)
        self._deadline = None if allowed is None else time.monotonic() + allowed
        self._quota_wait = settings.quota_wait

    def remaining(self) -> float | None:
        """Return the seconds until the deadline, 0 or more; None for no deadline."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def delay(self, error: Llama2Error) -> float | None:
        """Return the seconds to wait for the quota before the next attempt; None to raise the error."""
        wait = error.retry_after
        if not isinstance(error, QuotaExceeded) or wait is None or wait > self._quota_wait:
            return None
        remaining = self.remaining()
        if remaining is not None and wait >= remaining:
            return None
        self._quota_wait -= wait
        return wait


class StreamProgress:
    """The text of a streamed reply so far, and the continuation of the reply by another call.

    Equal requests with equal seeds get equal replies. To continue a stream that broke off, the client therefore sends
    the same request again, skips the text that it already has, and raises the error if the text differs.
    """

    def __init__(
        self, settings: ClientSettings, request: text_generation_pb2.GenerateRequest, timeout: float | None
    ) -> None:
        if settings.resume and not request.HasField("seed"):
            request.seed = secrets.randbits(64)
        self.request = request
        self.closed = False
        self.on_complete: Callable[[Reply], None] | None = None
        self.reply: Reply | None = None
        self._attempts = Attempts(settings, timeout)
        self._resumptions = settings.max_attempts - 1 if settings.resume else 0
        self._texts: list[str] = []
        self._completion: text_generation_pb2.Completion | None = None
        self._expected = ""  # text of the broken stream that the current call has not repeated yet
        self._interruption: Llama2Error | None = None  # the error that broke the stream

    @property
    def text(self) -> str:
        """The text received so far."""
        return "".join(self._texts)

    @property
    def wait_for_ready(self) -> bool:
        """Whether the call waits for a connection: a server that broke a stream may take longer to restart than
        gRPC's retries last. Without a deadline, the wait could be endless.
        """
        return self._interruption is not None and self._attempts.remaining() is not None

    def remaining(self) -> float | None:
        """Return the seconds until the deadline; None for no deadline."""
        return self._attempts.remaining()

    def accept(self, message: text_generation_pb2.GenerateStreamResponse) -> str:
        """Return the new text of a message.

        Raises:
            Llama2Error: the error that broke the stream, if the repeated reply differs from the text so far.
        """
        if message.HasField("completion"):
            self._completion = message.completion
        size = min(len(self._expected), len(message.response))
        repeated, new = message.response[:size], message.response[size:]
        if not self._expected.startswith(repeated):
            raise self._differs()
        self._expected = self._expected[size:]
        if new:
            self._texts.append(new)
        return new

    def finish(self) -> None:
        """Store the reply at the end of the stream.

        Raises:
            InternalError: the server did not send a completion.
        """
        self.closed = True
        if self._completion is None:
            raise InternalError("the server ended the stream without a completion")
        if self._expected:
            raise self._differs()
        self.reply = Reply.from_proto(self.text, self._completion, self.request)
        if self.on_complete is not None:
            self.on_complete(self.reply)

    def delay(self, error: Llama2Error) -> float | None:
        """Return the seconds to wait before the call is sent again; None to raise the error."""
        if isinstance(error, Unavailable) and self._resumptions and self._texts:
            self._resumptions -= 1
            self._interruption = error
            self._expected = self.text
            self._completion = None
            return self._wait_within_deadline(error)
        return self._attempts.delay(error)

    def _wait_within_deadline(self, error: Llama2Error) -> float | None:
        wait, remaining = error.retry_after or 0.0, self._attempts.remaining()
        return wait if remaining is None or wait < remaining else None

    def _differs(self) -> Llama2Error:
        cause = "" if self._interruption is None else f": {self._interruption.message}"
        return Unavailable(f"the stream broke off, and the repeated reply differs from its text{cause}")
