"""Retries by the client itself: waiting for the quota, and continuing a stream that broke off.

gRPC retries calls that fail before their first message; see `channel.service_config`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

from llama2.v1 import text_generation_pb2
from llama2_client.errors import InternalError, Llama2Error, QueueFull, QuotaExceeded, Unavailable
from llama2_client.reply import Reply
from llama2_client.settings import ClientSettings

FREE_RESUMPTIONS = 3  # a server computes a reply again as often without a price


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


def with_key(settings: ClientSettings, request: text_generation_pb2.GenerateRequest) -> None:
    """Give the request an idempotency key if the settings say so: repeated calls then are one call, and cost once."""
    if settings.resume:
        request.idempotency_key = uuid.uuid4().hex


class StreamProgress:
    """The text of a streamed reply so far, and the continuation of the reply by another call.

    A request with an idempotency key can be sent again: the server then sends the text after the characters that the
    client has.
    """

    def __init__(
        self, settings: ClientSettings, request: text_generation_pb2.GenerateRequest, timeout: float | None
    ) -> None:
        with_key(settings, request)
        self.request = request
        self.closed = False
        self.on_complete: Callable[[Reply], None] | None = None
        self.reply: Reply | None = None
        self._attempts = Attempts(settings, timeout)
        self._resumptions = min(settings.max_attempts - 1, FREE_RESUMPTIONS) if settings.resume else 0
        self._texts: list[str] = []
        self._completion: text_generation_pb2.Completion | None = None
        self._interruption: Llama2Error | None = None
        self._unconfirmed = False

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
        """Return the text of a message.

        Raises:
            Llama2Error: the error that broke the stream, if the server cannot continue it.
        """
        if self._unconfirmed:
            # An older server ignores the key and the position, and sends the whole text again.
            if message.resumed_after_characters != self.request.resume_after_characters:
                raise self._interruption or InternalError("the server does not continue the stream")
            self._unconfirmed = False
        if message.HasField("completion"):
            self._completion = message.completion
        if message.response:
            self._texts.append(message.response)
        return message.response

    def finish(self) -> None:
        """Store the reply at the end of the stream.

        Raises:
            InternalError: the server did not send a completion.
        """
        self.closed = True
        if self._completion is None:
            raise InternalError("the server ended the stream without a completion")
        self.reply = Reply.from_proto(self.text, self._completion, self.request)
        if self.on_complete is not None:
            self.on_complete(self.reply)

    def delay(self, error: Llama2Error) -> float | None:
        """Return the seconds to wait before the call is sent again; None to raise the error."""
        if self._texts and _is_broken_connection(error) and self._resumptions:
            self._resumptions -= 1
            self._interruption = error
            self.request.resume_after_characters = len(self.text)
            self._unconfirmed = True
            return self._wait_within_deadline(error)
        if self._interruption is not None and isinstance(error, QueueFull) and self._attempts.remaining() is not None:
            return self._wait_within_deadline(error)  # the reply was accepted once, and is not paid again
        return self._attempts.delay(error)

    def _wait_within_deadline(self, error: Llama2Error) -> float | None:
        wait, remaining = error.retry_after or 0.0, self._attempts.remaining()
        return wait if remaining is None or wait < remaining else None


def _is_broken_connection(error: Llama2Error) -> bool:
    """Return whether the server, or something between it and the client, ended the connection.

    A proxy whose server ends the connection resets the stream, which gRPC reports with other codes and this message.
    """
    return isinstance(error, Unavailable) or (error.reason is None and "RST_STREAM" in error.message)
