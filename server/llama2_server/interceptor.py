"""The one place where a handler's exception becomes a gRPC status, and where unreadable bytes are refused."""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, NoReturn

import grpc
import grpc.aio

from llama2_server.errors import InternalFault, InvalidRequest, ServiceError, Violation

logger = logging.getLogger(__name__)

REQUEST_ID: ContextVar[str] = ContextVar("request_id")
"""The server's name for the call being served."""

Handler = Callable[[Any, Any], Awaitable[Any]]


class _Malformed:
    """Stands for request bytes that are no message, until the handler's wrapper can refuse them."""


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Gives each call a request id, and maps exceptions to statuses: ServiceError to its own, all others to INTERNAL.

    gRPC itself would answer malformed bytes and unforeseen exceptions with UNKNOWN and the exception's text.
    """

    def __init__(self) -> None:
        self.calls = 0
        """How many calls have come."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap a method that takes one request; streams of requests (reflection) pass as they are."""
        self.calls += 1
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        if handler.unary_unary is not None:
            make, behaviour = grpc.unary_unary_rpc_method_handler, _guarded(handler.unary_unary)
        elif asyncio.iscoroutinefunction(handler.unary_stream):
            make, behaviour = grpc.unary_stream_rpc_method_handler, _guarded(handler.unary_stream)
        else:
            return handler
        return make(behaviour, _tolerant(handler.request_deserializer), handler.response_serializer)


def _tolerant(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def deserialize(data: bytes) -> Any:
        try:
            return deserializer(data)
        except Exception:  # protobuf's DecodeError, and whatever else its runtimes raise
            return _Malformed()

    return deserialize


def _guarded(behaviour: Handler) -> Handler:
    async def guarded(request: Any, context: Any) -> Any:
        request_id = uuid.uuid4().hex
        REQUEST_ID.set(request_id)
        try:
            if isinstance(request, _Malformed):
                raise InvalidRequest([Violation("", "the request is not a valid protobuf message of this method")])
            return await behaviour(request, context)
        except ServiceError as error:
            await _abort(context, error, request_id)
        except grpc.aio.AbortError:
            raise
        except Exception:
            # The traceback holds code, never the request: no exception of ours formats a prompt.
            logger.exception("request %s failed", request_id)
            await _abort(context, InternalFault(), request_id)

    return guarded


async def _abort(context: Any, error: ServiceError, request_id: str) -> NoReturn:
    message, trailers = error.to_status(request_id)
    await context.abort(error.code, message, tuple(trailers))
    raise AssertionError("abort always raises")
