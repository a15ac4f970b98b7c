"""The one place where a call begins and ends: where exceptions become statuses, and unreadable bytes are refused."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import grpc
import grpc.aio

from llama2_server.errors import InternalError, InvalidRequest, ServiceError, Violation
from llama2_server.telemetry.call import CALL, Call
from llama2_server.telemetry.telemetry import Telemetry

logger = logging.getLogger(__name__)

Handler = Callable[[Any, Any], Awaitable[Any]]
StreamHandler = Callable[[Any, Any], AsyncIterator[Any]]
STATUS_NAMES = {status.value[0]: status.name for status in grpc.StatusCode}


class _Malformed:
    """Stands for request bytes that are no message, until the handler's wrapper can refuse them."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Opens and ends the telemetry of each call, and maps exceptions to statuses.

    ServiceError goes to its own status, all others to INTERNAL: gRPC itself would answer malformed bytes and unforeseen
    exceptions with UNKNOWN and the exception's text. What gRPC refuses before a request has arrived, such as a message
    that is too large, is never seen here.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self.calls = 0
        """How many calls have come."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap a method: all of ours take one request; a stream of requests (reflection) is only observed."""
        self.calls += 1
        handler = await continuation(handler_call_details)
        if handler is None:
            self._telemetry.metrics.unknown_method()
            return None
        method = _text(handler_call_details.method).removeprefix("/")
        if handler.stream_stream is not None:
            observed: Any = self._observed(method, cast(StreamHandler, handler.stream_stream))
            return grpc.stream_stream_rpc_method_handler(
                observed, handler.request_deserializer, handler.response_serializer
            )
        if handler.request_deserializer is None:
            return handler
        if handler.unary_unary is not None:
            make, behaviour = grpc.unary_unary_rpc_method_handler, self._guarded(method, handler.unary_unary)
        elif asyncio.iscoroutinefunction(handler.unary_stream):
            make, behaviour = grpc.unary_stream_rpc_method_handler, self._guarded(method, handler.unary_stream)
        else:
            return handler
        return make(behaviour, _tolerant(handler.request_deserializer), handler.response_serializer)

    def _guarded(self, method: str, behaviour: Handler) -> Handler:
        async def guarded(request: Any, grpc_context: Any) -> Any:
            context = _Context(grpc_context)
            with _call(self._telemetry, method, context) as call:
                try:
                    if isinstance(request, _Malformed):
                        problem = "the request is not a valid protobuf message of this method"
                        raise InvalidRequest([Violation("", problem)])
                    return await behaviour(request, context)
                except ServiceError as error:
                    await _abort(context, error, call)
                except grpc.aio.AbortError:
                    raise
                except Exception as error:
                    # The log tells where it happened, and not the exception's message: that may quote the request.
                    logger.error("request %s failed", call.request_id, exc_info=error)  # noqa: TRY400
                    await _abort(context, InternalError(), call)

        return guarded

    def _observed(self, method: str, behaviour: StreamHandler) -> StreamHandler:
        async def observed(requests: Any, context: Any) -> AsyncIterator[Any]:
            with _call(self._telemetry, method, context):
                async for response in behaviour(requests, context):
                    yield response

        return observed


class _Context:
    """gRPC's context; but to send to a caller who has gone is what a cancel is.

    gRPC fails what is being sent at that moment, and delivers the cancel only later. A caller who hangs up while a
    message waits for him to read, or whose deadline passes as he is refused, would look like a fault of the server.
    """

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        with _gone_is_cancelled():
            await self._context.write(message)

    async def abort(self, *status: Any) -> NoReturn:
        with _gone_is_cancelled():
            await self._context.abort(*status)
        raise AssertionError("abort always raises")


@contextmanager
def _gone_is_cancelled() -> Iterator[None]:
    try:
        yield
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


@contextmanager
def _call(telemetry: Telemetry, method: str, context: Any) -> Iterator[Call]:
    """A call from its request to its status, for the body of the `with`; anything may end it."""
    call = Call(telemetry, method, context.invocation_metadata(), _expiry(context))
    CALL.set(call)
    code = "OK"
    try:
        yield call
    except grpc.aio.AbortError:
        code = _status_name(context.code())
        raise
    except (asyncio.CancelledError, GeneratorExit):
        code = "DEADLINE_EXCEEDED" if call.expired() else "CANCELLED"
        raise
    except BaseException:
        code = "UNKNOWN"  # what gRPC makes of it
        raise
    finally:
        call.finish(code)


def _tolerant(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def deserialize(data: bytes) -> Any:
        try:
            return deserializer(data)
        except Exception:  # protobuf's DecodeError, and whatever else its runtimes raise
            return _Malformed()

    return deserialize


async def _abort(context: _Context, error: ServiceError, call: Call) -> NoReturn:
    call.error = error
    message, trailers = error.to_status(call.request_id)
    await context.abort(error.code, message, tuple(trailers))


def _expiry(context: Any) -> Callable[[], bool]:
    """Tells whether the call's deadline has passed, for a call that its caller has ended.

    A caller's own timer ends the call a moment before the server's: gRPC rounds the timeout up by about 1% on the wire.
    """
    granted = context.time_remaining()
    if granted is None:
        return lambda: False
    return lambda: bool(context.time_remaining() <= 0.02 * granted + 0.02)


def _status_name(code: Any) -> str:
    """The name of a status as a context has it: grpc.aio keeps the number."""
    return code.name if isinstance(code, grpc.StatusCode) else STATUS_NAMES.get(code, "UNKNOWN")


def _text(method: str | bytes) -> str:
    return method.decode() if isinstance(method, bytes) else method
