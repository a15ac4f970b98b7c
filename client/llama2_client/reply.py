"""Messages and replies: `Message`, `Reply` and the streamed `ReplyStream`."""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from decimal import Decimal
from types import TracebackType
from typing import Literal, Self

import grpc
from google.protobuf.duration_pb2 import Duration

from llama2.v1 import text_generation_pb2
from llama2_client.errors import InternalError, translate_errors


class FinishReason(enum.StrEnum):
    """The reason why a reply ended."""

    UNSPECIFIED = "UNSPECIFIED"  # a newer server sent a reason that this client does not know
    END_OF_SEQUENCE = "END_OF_SEQUENCE"  # the model ended the reply
    STOP_SEQUENCE = "STOP_SEQUENCE"  # the reply completed one of the request's `stop` texts
    MAX_TOKENS = "MAX_TOKENS"  # the reply reached `max_tokens`

    @classmethod
    def from_proto(cls, value: text_generation_pb2.FinishReason) -> FinishReason:
        """Return the member for a protobuf value; UNSPECIFIED for an unknown one."""
        try:
            return cls(text_generation_pb2.FinishReason.Name(value).removeprefix("FINISH_REASON_"))
        except ValueError:
            return cls.UNSPECIFIED


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, or its system prompt; `content` is plain text."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole reply: its text, how it ended and its cost."""

    text: str
    finish_reason: FinishReason
    input_tokens: int
    output_tokens: int
    neurons: Decimal
    reused_input_tokens: int  # input tokens reused from the KV cache
    seed: int
    cached: bool  # True: from the response cache, or shared with an identical request in progress
    request_id: str
    queue_time_seconds: float
    time_to_first_token_seconds: float
    total_time_seconds: float

    @classmethod
    def from_proto(cls, text: str, completion: text_generation_pb2.Completion) -> Reply:
        """Build a reply from its text and the server's completion message."""
        usage, timings = completion.usage, completion.timings
        return cls(
            text=text,
            finish_reason=FinishReason.from_proto(completion.finish_reason),
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            neurons=Decimal(usage.neurons or 0),
            reused_input_tokens=usage.reused_input_tokens,
            seed=completion.seed,
            cached=completion.cached,
            request_id=completion.request_id,
            queue_time_seconds=_seconds(timings.queue_time),
            time_to_first_token_seconds=_seconds(timings.time_to_first_token),
            total_time_seconds=_seconds(timings.total_time),
        )


class ReplyStream:
    """A reply while it is generated: an async iterator over its text. `reply` is available after the end.

    ```python
    async with client.stream("Tell me a story about a fox.") as stream:
        async for delta in stream:
            print(delta, end="", flush=True)
    print(stream.reply.finish_reason)
    ```

    Leaving the `async with` block early, or calling `aclose`, cancels the call: the model stops within one decode step.
    """

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[text_generation_pb2.GenerateRequest, text_generation_pb2.GenerateStreamResponse],
    ) -> None:
        self._call = call
        self._messages = aiter(call)
        self._on_complete: Callable[[Reply], None] | None = None
        self._texts: list[str] = []
        self._completion: text_generation_pb2.Completion | None = None
        self._reply: Reply | None = None
        self._closed = False

    @property
    def text(self) -> str:
        """The text received so far."""
        return "".join(self._texts)

    @property
    def reply(self) -> Reply:
        """The whole reply. Raises RuntimeError if the stream has not ended, has failed or was closed early."""
        if self._reply is None:
            raise RuntimeError("the reply is not complete; read the stream to its end")
        return self._reply

    @property
    def closed(self) -> bool:
        """True if no more text can follow: the stream ended, failed or was closed."""
        return self._closed

    def on_complete(self, callback: Callable[[Reply], None]) -> None:
        """Call `callback` with the reply at the end of the stream; never if the stream fails or is closed early."""
        self._on_complete = callback

    async def aclose(self) -> None:
        """Cancel the call if it is in progress, without waiting for the server."""
        self._closed = True
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
        while not self._closed:
            try:
                with translate_errors():
                    message = await anext(self._messages)
            except StopAsyncIteration:
                self._finish()
            except asyncio.CancelledError:
                # gRPC raises it also if another task closed the stream. Then the iteration ends, without an error.
                closed_by_another, self._closed = self._closed, True
                task = asyncio.current_task()
                if not closed_by_another or (task is not None and task.cancelling()):
                    raise
            except BaseException:
                self._closed = True
                raise
            else:
                if message.HasField("completion"):
                    self._completion = message.completion
                if message.response:
                    self._texts.append(message.response)
                    return message.response
        raise StopAsyncIteration

    def _finish(self) -> None:
        self._closed = True
        if self._completion is None:
            raise InternalError("the server ended the stream without a completion")
        self._reply = Reply.from_proto(self.text, self._completion)
        if self._on_complete is not None:
            self._on_complete(self._reply)

    def __del__(self) -> None:
        # Stop the model even if the stream is dropped without being closed. The event loop may be closed by then.
        with contextlib.suppress(RuntimeError):
            self._call.cancel()


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
