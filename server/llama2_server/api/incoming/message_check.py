"""Reject malformed and too large messages with details: gRPC would answer with UNKNOWN and the parser's text."""

import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, cast

import grpc
import grpc.aio

from llama2_server.errors import InvalidRequest, RequestTooLarge, ServiceError, Violation

Handler = Callable[[Any, Any], Awaitable[Any]]


class RejectedRequest:
    """A placeholder for a message that is malformed or too large, until the wrapped handler raises its error."""

    def __init__(self, error: InvalidRequest) -> None:
        self.error = error


def safe_deserializer(deserializer: Callable[[bytes], Any], max_bytes: int) -> Callable[[bytes], Any]:
    """Return a deserializer that never raises, because gRPC would answer with UNKNOWN and the exception's text.

    `data` is the uncompressed message.
    """

    def deserialize(data: bytes) -> Any:
        if len(data) > max_bytes:
            return RejectedRequest(RequestTooLarge(len(data), max_bytes))
        try:
            return deserializer(data)
        except Exception:  # protobuf's DecodeError, and other exceptions of its runtimes
            description = "the request is not a valid protobuf message of this method"
            return RejectedRequest(InvalidRequest([Violation("", description)]))

    return deserialize


def accepted(request: Any) -> Any:
    """Return the request; raises the error of a rejected one."""
    if isinstance(request, RejectedRequest):
        raise request.error
    return request


class KeylessHandlers(Protocol):
    """Limits the open calls; keyless_calls.py has the implementation."""

    def reading(self, behavior: Handler) -> Handler:
        """Return a handler with a request stream."""


class MessageCheck(grpc.aio.ServerInterceptor):
    """Limits calls and rejects malformed messages on the health port, whose calls are neither counted nor logged."""

    def __init__(self, max_message_bytes: int, keyless: KeylessHandlers) -> None:
        self._max_message_bytes = max_message_bytes
        self._keyless = keyless

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap a method of the health service; each of them takes one request and is a coroutine."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        deserializer = safe_deserializer(handler.request_deserializer, self._max_message_bytes)
        if handler.unary_unary is not None:
            make, behavior = grpc.stream_unary_rpc_method_handler, cast(Handler, handler.unary_unary)
        else:
            make, behavior = grpc.stream_stream_rpc_method_handler, cast(Handler, handler.unary_stream)
        read = self._keyless.reading(behavior)

        async def handle(requests: Any, context: Any) -> Any:
            try:
                return await read(requests, context)
            except ServiceError as error:
                message, trailers = error.to_status(uuid.uuid4().hex)
                await context.abort(error.code, message, tuple(trailers))

        return make(handle, deserializer, handler.response_serializer)
