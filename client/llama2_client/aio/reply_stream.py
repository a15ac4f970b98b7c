"""A reply while it is generated, as an async iterator."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Self, TypeAlias

import grpc

from llama2.v1 import text_generation_pb2
from llama2_client.attempts import StreamProgress
from llama2_client.errors import Llama2Error
from llama2_client.reply import Reply

StreamCall: TypeAlias = grpc.aio.UnaryStreamCall[
    text_generation_pb2.GenerateRequest, text_generation_pb2.GenerateStreamResponse
]


class ReplyStream:
    """A reply while it is generated: an async iterator over its text. `reply` is available after the end.

    ```python
    async with client.stream("Tell me a story about a fox.") as stream:
        async for delta in stream:
            print(delta, end="", flush=True)
    print(stream.reply.finish_reason)
    ```

    Leaving the `async with` block early, or calling `aclose`, cancels the call. A waiting call then gets the slot
    within one decode step; without one, the model continues for the server's resume window, at no price.
    """

    def __init__(
        self,
        progress: StreamProgress,
        start: Callable[[StreamProgress], StreamCall],
        translate: Callable[[grpc.aio.AioRpcError], Awaitable[Llama2Error]],
    ) -> None:
        self._progress = progress
        self._start = start
        self._translate = translate
        self._closing = asyncio.Event()
        self._call = start(progress)
        self._messages = aiter(self._call)

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

    async def aclose(self) -> None:
        """Cancel the call if it is in progress, without waiting for the server."""
        self._progress.closed = True
        self._closing.set()
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while not self.closed:
            try:
                if text := await self._read():
                    return text
            except asyncio.CancelledError:
                # gRPC raises it also if another task closed the stream. Then the iteration ends, without an error.
                closed_by_another = self.closed
                await self.aclose()
                task = asyncio.current_task()
                if not closed_by_another or (task is not None and task.cancelling()):
                    raise
            except BaseException:
                await self.aclose()
                raise
        raise StopAsyncIteration

    async def _read(self) -> str:
        """Return the text of the next message; empty if the stream ends or the call is sent again."""
        try:
            return self._progress.accept(await anext(self._messages))
        except StopAsyncIteration:
            self._progress.finish()
        except grpc.aio.AioRpcError as error:
            translated = await self._translate(error)
            delay = self._progress.delay(translated)
            if delay is None:
                raise translated from error
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), delay)
            if not self.closed:
                self._call = self._start(self._progress)
                self._messages = aiter(self._call)
        return ""

    def __del__(self) -> None:
        # Stop the model even if the stream is dropped without being closed. The event loop may be closed by then.
        with contextlib.suppress(RuntimeError, AttributeError):
            self._call.cancel()
