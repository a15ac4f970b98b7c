"""Clients that receive wrongly; each has one wrong behavior."""

# ruff: noqa: D102 - a class docstring is the behavior; the methods override those of ReferenceClient

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from google.rpc import status_pb2

from conformance.client_runner.reference import ReferenceClient
from llama2.v1 import text_generation_pb2 as pb


class SeedAsDouble(ReferenceClient):
    """Returns the seed as a floating-point number."""

    def seed(self, seed: int) -> str:
        return f"{float(seed):.0f}"


class PriceAsDouble(ReferenceClient):
    """Returns the price as a floating-point number."""

    def neurons(self, neurons: str) -> str:
        return str(float(neurons))


class FinishReasonAsNumber(ReferenceClient):
    """Returns the number of the finish reason."""

    def finish_reason(self, number: int) -> str:
        return str(number)


class RejectsUnknownEnum(ReferenceClient):
    """Fails at an unknown finish reason."""

    def finish_reason(self, number: int) -> str:
        return pb.FinishReason.Name(number)  # any number may arrive


class RejectsUnknownFields(ReferenceClient):
    """Fails at an unknown field."""

    def parse(self, data: bytes) -> pb.GenerateStreamResponse:
        message = super().parse(data)
        message.DiscardUnknownFields()
        if message.ByteSize() != len(data) and not message.HasField("completion"):
            raise ValueError("unknown field")
        return message


class EndsAtEmptyDelta(ReferenceClient):
    """Ends at a message without text."""

    async def read(self, call: Any) -> AsyncIterator[pb.GenerateStreamResponse]:
        async for message in call:
            if message.response or message.HasField("completion"):
                yield message
            else:
                yield pb.GenerateStreamResponse(completion=pb.Completion(finish_reason=pb.FINISH_REASON_MAX_TOKENS))
                return


class EndsAtCompletion(ReferenceClient):
    """Does not read the end of the call."""

    async def read(self, call: Any) -> AsyncIterator[pb.GenerateStreamResponse]:
        async for message in call:
            yield message
            if message.HasField("completion"):
                return


class IgnoresTextOfLast(ReferenceClient):
    """Ignores the text of the message with the completion."""

    def text(self, message: pb.GenerateStreamResponse) -> str:
        return "" if message.HasField("completion") else message.response


class LimitsMessages(ReferenceClient):
    """Reads at most 1,000 messages."""

    async def read(self, call: Any) -> AsyncIterator[pb.GenerateStreamResponse]:
        count = 0
        async for message in call:
            count += 1
            if count <= 1000 or message.HasField("completion"):
                yield message


class AsciiOnly(ReferenceClient):
    """Replaces characters that are not ASCII."""

    def text(self, message: pb.GenerateStreamResponse) -> str:
        return message.response.encode("ascii", "replace").decode()


class AcceptsMissingCompletion(ReferenceClient):
    """Takes a stream without a completion for a whole reply."""

    def success(self, text: str, completion: pb.Completion | None) -> dict[str, Any]:
        return super().success(text, completion or pb.Completion())


class AcceptsCutStream(ReferenceClient):
    """Takes a cut stream for a whole reply."""

    def failure(self, error: grpc.aio.AioRpcError, text: str) -> dict[str, Any]:
        answer = super().failure(error, text)
        cut = text and not answer["reason"] and answer["code"] not in {"DEADLINE_EXCEEDED"}
        return self.success(text, pb.Completion()) if cut else answer


class DropsPartialText(ReferenceClient):
    """Loses the text so far at an error."""

    def failure(self, error: grpc.aio.AioRpcError, text: str) -> dict[str, Any]:
        return super().failure(error, "")


class EndsWhenIdle(ReferenceClient):
    """Ends when no message arrives for 300 milliseconds."""

    async def read(self, call: Any) -> AsyncIterator[pb.GenerateStreamResponse]:
        messages = aiter(call)
        while True:
            try:
                async with asyncio.timeout(0.3):
                    message = await anext(messages)
            except (StopAsyncIteration, TimeoutError):
                return
            yield message

    def success(self, text: str, completion: pb.Completion | None) -> dict[str, Any]:
        answer = super().success(text, completion)
        return answer | {"code": "ABORTED"} if text == "Hello" else answer


class ClosesAtGoaway(ReferenceClient):
    """Ends the running call when its connection takes no further calls."""

    async def read(self, call: Any) -> AsyncIterator[pb.GenerateStreamResponse]:
        messages = aiter(call)
        yield await anext(messages)
        changed = asyncio.ensure_future(self.channel.wait_for_state_change(grpc.ChannelConnectivity.READY))
        try:
            while True:
                message = asyncio.ensure_future(anext(messages, None))
                done, _ = await asyncio.wait({message, changed}, return_when=asyncio.FIRST_COMPLETED)
                if message not in done:
                    message.cancel()
                    return
                received = message.result()
                if received is None:
                    return
                yield received
        finally:
            changed.cancel()


class TrustsDetails(ReferenceClient):
    """Fails at details that cannot be read."""

    def status(self, error: grpc.aio.AioRpcError) -> status_pb2.Status:
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
        return status_pb2.Status.FromString(details if isinstance(details, bytes) else b"")


class NeedsDetails(ReferenceClient):
    """Takes an error without details for an internal one."""

    def failure(self, error: grpc.aio.AioRpcError, text: str) -> dict[str, Any]:
        answer = super().failure(error, text)
        return answer if answer["reason"] or answer["text"] else answer | {"code": "INTERNAL"}


class FirstDetailOnly(ReferenceClient):
    """Reads only the first detail."""

    def status(self, error: grpc.aio.AioRpcError) -> status_pb2.Status:
        status = super().status(error)
        del status.details[1:]
        return status


class FirstViolationOnly(ReferenceClient):
    """Returns only the first violation."""

    def failure(self, error: grpc.aio.AioRpcError, text: str) -> dict[str, Any]:
        answer = super().failure(error, text)
        return answer | {"fields": answer["fields"][:1]}


class KnownReasonsOnly(ReferenceClient):
    """Drops unknown reasons."""

    def failure(self, error: grpc.aio.AioRpcError, text: str) -> dict[str, Any]:
        answer = super().failure(error, text)
        return answer | {"reason": answer["reason"].replace("SOMETHING_NEW", "")}


class IgnoresRetryInfo(ReferenceClient):
    """Does not return the delay of RetryInfo."""

    def failure(self, error: grpc.aio.AioRpcError, text: str) -> dict[str, Any]:
        return super().failure(error, text) | {"retry_after_ms": None}


class Latin1Messages(ReferenceClient):
    """Reads the status message as Latin-1."""

    def message(self, message: str) -> str:
        return message.encode().decode("latin-1")


class UnknownCodeIsInternal(ReferenceClient):
    """Takes an unknown status code for INTERNAL."""

    def failure(self, error: grpc.aio.AioRpcError, text: str) -> dict[str, Any]:
        answer = super().failure(error, text)
        return answer | {"code": "INTERNAL"} if answer["code"] == "UNKNOWN" else answer
