"""A correct client on generated stubs. Client mutants are subclasses of it (`mutants.py`)."""

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from llama2.v1 import text_generation_pb2 as pb

RETRY_POLICY = {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 3,
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
}
SERVICE = "llama2.v1.TextGenerationService"


class ReferenceClient:
    """Makes the calls of commands, as an adapter does. Each method is one behavior that a mutant changes."""

    def __init__(self, address: str) -> None:
        config = {"methodConfig": [{"name": [{"service": SERVICE}], "retryPolicy": self.retry_policy()}]}
        options = [("grpc.service_config", json.dumps(config)), ("grpc.use_local_subchannel_pool", 1), *self.options()]
        self.channel = grpc.aio.insecure_channel(address, options=options)

    async def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Make one call and return the answer."""
        request = self.request(command["request"])
        received: list[str] = []
        answer: dict[str, Any]
        completion = None
        call = self.start(command, request)
        try:
            async for message in self.read(call):
                received.append(self.text(message))
                completion = message.completion if message.HasField("completion") else completion
                if len([text for text in received if text]) == command.get("cancel_after"):
                    self.cancel(call)
                    return {"code": "CANCELLED", "text": "".join(received)}
            answer = self.success("".join(received), completion)
        except grpc.aio.AioRpcError as error:
            answer = self.failure(error, "".join(received))
        return await self.finish(command, answer)

    def retry_policy(self) -> dict[str, Any]:
        """Return the retry policy of the channel."""
        return RETRY_POLICY

    def options(self) -> list[tuple[str, int]]:
        """Return options of the channel."""
        return []

    def request(self, document: dict[str, Any]) -> pb.GenerateRequest:
        """Return the request of a command."""
        return ParseDict(document, pb.GenerateRequest())

    def metadata(self, key: str | None) -> list[tuple[str, str]]:
        """Return the metadata of a call."""
        return [] if key is None else [("authorization", f"Bearer {key}")]

    def timeout(self, command: dict[str, Any]) -> float | None:
        """Return the deadline in seconds."""
        return float(command.get("deadline_ms", 20_000)) / 1000

    def start(self, command: dict[str, Any], request: pb.GenerateRequest) -> Any:
        """Start a call."""
        method: Any = self.channel.unary_stream(
            f"/{SERVICE}/{command['call']}", pb.GenerateRequest.SerializeToString, self.parse
        )
        return method(request, timeout=self.timeout(command), metadata=self.metadata(command.get("key")))

    def parse(self, data: bytes) -> pb.GenerateStreamResponse:
        """Parse a message."""
        return pb.GenerateStreamResponse.FromString(data)

    def read(self, call: Any) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Yield the messages."""
        return aiter(call)

    def text(self, message: pb.GenerateStreamResponse) -> str:
        """Return the text of a message."""
        return message.response

    def cancel(self, call: Any) -> None:
        """Cancel a call."""
        call.cancel()

    def success(self, text: str, completion: pb.Completion | None) -> dict[str, Any]:
        """Return the answer for a stream that ended with OK."""
        if completion is None:
            return {"code": "INTERNAL", "text": text, "message": "the stream has no completion"}
        return {
            "code": "OK",
            "text": text,
            "finish_reason": self.finish_reason(completion.finish_reason),
            "seed": self.seed(completion.seed),
            "neurons": self.neurons(completion.usage.neurons),
        }

    def finish_reason(self, number: int) -> str:
        """Return the name of a finish reason; the number of an unknown one."""
        known = {value.number: value.name for value in pb.FinishReason.DESCRIPTOR.values}
        return known.get(number, str(number)).removeprefix("FINISH_REASON_")

    def seed(self, seed: int) -> str:
        """Return the seed in digits."""
        return str(seed)

    def neurons(self, neurons: str) -> str:
        """Return the price."""
        return neurons

    def failure(self, error: grpc.aio.AioRpcError, text: str) -> dict[str, Any]:
        """Return the answer for an error."""
        info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        for detail in self.status(error).details:
            any(detail.Unpack(message) for message in (info, bad_request, retry))
        return {
            "code": error.code().name,
            "text": text,
            "message": self.message(error.details() or ""),
            "reason": info.reason,
            "fields": sorted(violation.field for violation in bad_request.field_violations),
            "retry_after_ms": retry.retry_delay.ToMilliseconds() if retry.HasField("retry_delay") else None,
        }

    def status(self, error: grpc.aio.AioRpcError) -> status_pb2.Status:
        """Return the details; an empty status if they cannot be read."""
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin" and isinstance(value, bytes):
                try:
                    return status_pb2.Status.FromString(value)
                except DecodeError:
                    break
        return status_pb2.Status()

    def message(self, message: str) -> str:
        """Return the status message."""
        return message

    async def finish(self, command: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        """Return the final answer of a command."""
        return answer
