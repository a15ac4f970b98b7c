"""What the model says: `Message`, `Reply`, and `ReplyStream`, a reply as it comes."""

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
from llama2_client.errors import InternalError, mapped


class FinishReason(enum.StrEnum):
    """Why a reply ended."""

    UNSPECIFIED = "UNSPECIFIED"  # a reason that this client does not know, from a newer server
    END_OF_SEQUENCE = "END_OF_SEQUENCE"  # the model ended the reply by itself
    STOP_SEQUENCE = "STOP_SEQUENCE"  # the reply completed one of the request's `stop` texts
    MAX_TOKENS = "MAX_TOKENS"  # the reply reached `max_tokens`


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole reply, how it ended and what it cost."""

    text: str
    finish_reason: FinishReason
    input_tokens: int
    output_tokens: int
    neurons: Decimal
    reused_input_tokens: int
    seed: int
    cached: bool
    request_id: str
    queue_time_seconds: float
    time_to_first_token_seconds: float
    total_time_seconds: float


class ReplyStream:
    """A reply as it comes: iterate over its text; `reply` has the figures after the end.

    ```python
    async with client.stream("Tell me a story about a fox.") as stream:
        async for delta in stream:
            print(delta, end="", flush=True)
    print(stream.reply.finish_reason)
    ```

    Leaving the `async with` block early, or `aclose`, cancels the call: the model stops within one step.
    """

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[text_generation_pb2.GenerateRequest, text_generation_pb2.GenerateStreamResponse],
    ) -> None:
        self._call = call
        self._messages = aiter(call)
        self._when_complete: Callable[[Reply], None] | None = None
        self._texts: list[str] = []
        self._completion: text_generation_pb2.Completion | None = None
        self._reply: Reply | None = None
        self._closed = False

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    @property
    def reply(self) -> Reply:
        """The whole reply. RuntimeError before the stream's end, and for a stream that failed or was left early."""
        if self._reply is None:
            raise RuntimeError("the stream has not come to its end")
        return self._reply

    @property
    def closed(self) -> bool:
        """True once no more text can come: the stream ended, failed, or was closed."""
        return self._closed

    def when_complete(self, callback: Callable[[Reply], None]) -> None:
        """Call `callback` with the reply at the stream's end; never for one that failed or was left early."""
        self._when_complete = callback

    async def aclose(self) -> None:
        """Cancel the call, if it has not ended, without waiting for the server."""
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
                with mapped():
                    message = await anext(self._messages)
            except StopAsyncIteration:
                self._finish()
            except asyncio.CancelledError:
                # gRPC raises it too when another task has closed the stream: then this one has merely come to its end.
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
            raise InternalError("the server ended the stream without saying how the reply ended")
        self._reply = reply_of(self.text, self._completion)
        if self._when_complete is not None:
            self._when_complete(self._reply)

    def __del__(self) -> None:
        # A stream that was dropped without being closed stops the model too. The loop may be closed by now.
        with contextlib.suppress(RuntimeError):
            self._call.cancel()


def reply_of(text: str, completion: text_generation_pb2.Completion) -> Reply:
    """Put the text and the contract's figures together."""
    usage, timings = completion.usage, completion.timings
    return Reply(
        text=text,
        finish_reason=_finish_reason(completion.finish_reason),
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


def _finish_reason(value: text_generation_pb2.FinishReason) -> FinishReason:
    try:
        return FinishReason(text_generation_pb2.FinishReason.Name(value).removeprefix("FINISH_REASON_"))
    except ValueError:
        return FinishReason.UNSPECIFIED


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
