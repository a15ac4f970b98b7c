"""A reply while it is generated, as an iterator."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, Self

import grpc

from llama2.v1 import text_generation_pb2
from llama2_client.attempts import StreamProgress
from llama2_client.errors import Llama2Error
from llama2_client.reply import Reply
from llama2_client.sync.interrupts import interruptible


class StreamCall(Protocol):
    """A call that streams messages."""

    def __next__(self) -> text_generation_pb2.GenerateStreamResponse:
        """Wait for the next message. Raise grpc.RpcError if the call fails."""

    def cancel(self) -> bool:
        """Cancel the call."""


class SyncReplyStream:
    """A reply while it is generated: an iterator over its text. `reply` is available after the end.

    ```python
    with client.stream("Tell me a story about a fox.") as stream:
        for delta in stream:
            print(delta, end="", flush=True)
    print(stream.reply.finish_reason)
    ```

    Leaving the `with` block early, or calling `close`, cancels the call. A waiting call then gets the slot
    within one decode step; without one, the model continues for the server's resume window, at no price.
    """

    def __init__(
        self,
        progress: StreamProgress,
        start: Callable[[StreamProgress], StreamCall],
        translate: Callable[[grpc.RpcError], Llama2Error],
    ) -> None:
        self._progress = progress
        self._start = start
        self._translate = translate
        self._closing = threading.Event()
        self._call = start(progress)

    @property
    def text(self) -> str:
        """The text received so far."""
        return self._progress.text

    @property
    def reply(self) -> Reply:
        """The whole reply. Raises RuntimeError if the stream has not ended, has failed or was closed early."""
        if self._progress.reply is None:
            raise RuntimeError("the reply is not complete; read the stream to its end")
        return self._progress.reply

    @property
    def closed(self) -> bool:
        """True if no more text can follow: the stream ended, failed or was closed."""
        return self._progress.closed

    def on_complete(self, callback: Callable[[Reply], None]) -> None:
        """Call `callback` with the reply at the end of the stream; never if the stream fails or is closed early."""
        self._progress.on_complete = callback

    def close(self) -> None:
        """Cancel the call if it is in progress, without waiting for the server. Another thread may call this."""
        self._progress.closed = True
        self._closing.set()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while not self.closed:
            try:
                if text := self._read():
                    return text
            except BaseException:  # Ctrl-C included
                self.close()
                raise
        raise StopIteration

    def _read(self) -> str:
        """Return the text of the next message; empty if the stream ends or the call is sent again."""
        try:
            with interruptible():
                message = next(self._call)
            return self._progress.accept(message)
        except StopIteration:
            self._progress.finish()
        except grpc.RpcError as error:
            if self.closed:  # another thread closed the stream
                return ""
            translated = self._translate(error)
            delay = self._progress.delay(translated)
            if delay is None:
                raise translated from error
            if not self._closing.wait(delay):
                self._call = self._start(self._progress)
        return ""

    def __del__(self) -> None:
        # Stop the model even if the stream is dropped without being closed.
        with contextlib.suppress(AttributeError):
            self._call.cancel()
