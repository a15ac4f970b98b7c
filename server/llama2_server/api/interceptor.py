"""Start and finish each call: map exceptions to statuses, and reject malformed messages."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NoReturn, cast

import grpc
import grpc.aio

from llama2_server.admission.accounts import Authenticator
from llama2_server.admission.call_budget import CallBudget
from llama2_server.api.incoming.keyless_calls import KeylessCalls
from llama2_server.api.incoming.message_check import Handler, accepted, safe_deserializer
from llama2_server.errors import InternalError, InvalidRequest, ServiceError, Unauthenticated
from llama2_server.telemetry.call import CALL, Call
from llama2_server.telemetry.guard import run_guarded
from llama2_server.telemetry.telemetry import Telemetry

logger = logging.getLogger(__name__)

ErrorTrailers = Callable[[ServiceError], list[tuple[str, str | bytes]]]
"""Returns further trailers of an error, in addition to its status."""
StreamHandler = Callable[[Any, Any], AsyncIterator[Any]]
API_PACKAGES = ("llama2.v1.", "llama2.hosted.v1.")
METHODS_WITHOUT_KEY = frozenset({"llama2.v1.ModelService/GetModelCard"})
FREE_METHODS = METHODS_WITHOUT_KEY | {
    "llama2.v1.TextGenerationService/CountTokens",
    "llama2.v1.AccountService/GetUsage",
}
"""Methods that generate nothing."""
_WITH_REQUEST_STREAM: dict[Any, Any] = {
    grpc.unary_unary_rpc_method_handler: grpc.stream_unary_rpc_method_handler,
    grpc.unary_stream_rpc_method_handler: grpc.stream_stream_rpc_method_handler,
}
STATUS_NAMES = {status.value[0]: status.name for status in grpc.StatusCode}


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Starts and finishes the telemetry of each call, and maps exceptions to statuses.

    A ServiceError has its own status; any other exception becomes INTERNAL. Without the interceptor, gRPC would answer
    malformed bytes and unexpected exceptions with UNKNOWN and the exception's text. Calls that gRPC rejects before the
    request has arrived, such as a message beyond gRPC's own limit, do not reach the interceptor.

    Args:
        telemetry: receives each call.
        max_message_bytes: the largest request message; a larger one is rejected with details.
        authenticator: finds the account of a call.
        budget: limits the calls that generate nothing.
        keyless: limits the open calls without a valid API key.
        error_trailers: by full service name, further trailers of the errors of its methods.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        max_message_bytes: int,
        authenticator: Authenticator,
        budget: CallBudget,
        keyless: KeylessCalls,
        error_trailers: Mapping[str, ErrorTrailers] | None = None,
    ) -> None:
        self._authenticator = authenticator
        self._budget = budget
        self._keyless = keyless
        self._telemetry = telemetry
        self.max_message_bytes = max_message_bytes
        self._error_trailers = error_trailers or {}
        self.calls = 0
        """Number of calls that have arrived."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap a method. Only reflection has a request stream."""
        self.calls += 1
        handler = await continuation(handler_call_details)
        if handler is None:
            run_guarded(self._telemetry.metrics.unknown_method)
            return None
        method = _text(handler_call_details.method).removeprefix("/")
        if handler.request_deserializer is None:
            return handler
        try:
            account_id = self._admit(method, handler_call_details.invocation_metadata)
        except Exception as error:  # gRPC would send the text of one that is not a ServiceError to the client
            return self._rejecting_handler(method, error, handler.response_serializer)
        deserializer = safe_deserializer(handler.request_deserializer, self.max_message_bytes)
        if handler.stream_stream is not None:
            stream = cast(StreamHandler, handler.stream_stream)
            wrapped: Any = self._wrap_stream(method, stream if account_id else self._counted(stream))
            return grpc.stream_stream_rpc_method_handler(wrapped, deserializer, handler.response_serializer)
        if handler.unary_unary is not None:
            make_handler = grpc.unary_unary_rpc_method_handler
            behavior: Handler = handler.unary_unary
        elif asyncio.iscoroutinefunction(handler.unary_stream):
            make_handler = grpc.unary_stream_rpc_method_handler
            behavior = handler.unary_stream
        else:
            return handler
        if account_id is None:
            behavior = self._keyless.reading(behavior)
            make_handler = _WITH_REQUEST_STREAM[make_handler]
        return make_handler(self._wrap_handler(method, behavior, account_id), deserializer, handler.response_serializer)

    def _counted(self, behavior: StreamHandler) -> StreamHandler:
        """Return a stream handler that counts as a call without a valid key."""

        async def handle_stream(requests: Any, context: Any) -> AsyncIterator[Any]:
            self._keyless.open(context)
            async for response in behavior(requests, context):
                yield response

        return handle_stream

    def _admit(self, method: str, metadata: Any) -> str | None:
        """Return the account of a call; None if its method needs no API key and it has no valid one.

        Raises:
            ServiceError: the method needs a valid API key, or there were too many calls that generate nothing.
        """
        metadata = metadata or ()
        if not method.startswith(API_PACKAGES) and not any(key == "authorization" for key, _ in metadata):
            return None
        try:
            account_id = self._authenticator.authenticate(metadata).id
        except ServiceError:
            if not method.startswith(API_PACKAGES):
                return None
            self._budget.take_keyless()
            if method in METHODS_WITHOUT_KEY:
                return None
            raise
        self._budget.check(account_id)
        if method in FREE_METHODS:
            self._budget.spend(account_id)
        return account_id

    def _rejecting_handler(
        self, method: str, error: Exception, serializer: Callable[[Any], bytes] | None
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """Return a handler that ends the call with the error.

        It has a request stream, from which it reads nothing: gRPC would read the message of another handler first.
        """

        async def reject(request: Any, context: Any) -> None:
            raise error

        return grpc.stream_unary_rpc_method_handler(self._wrap_handler(method, reject), None, serializer)

    def _wrap_handler(self, method: str, behavior: Handler, account_id: str | None = None) -> Handler:
        further = self._error_trailers.get(method.partition("/")[0], _no_trailers)

        async def handle(request: Any, grpc_context: Any) -> Any:
            context = _Context(grpc_context)
            with _tracked_call(self._telemetry, method, context) as call:
                call.account_id = account_id
                async with _errors_as_statuses(context, call, further):
                    with self._paying(method, account_id):
                        return await behavior(accepted(request), context)

        return handle

    @contextmanager
    def _paying(self, method: str, account_id: str | None) -> Iterator[None]:
        """Take a token from the account's bucket if the body rejects the request; a free method has taken one."""
        try:
            yield
        except (InvalidRequest, Unauthenticated):
            if account_id is not None and method not in FREE_METHODS:
                self._budget.spend(account_id)
            raise

    def _wrap_stream(self, method: str, behavior: StreamHandler) -> StreamHandler:
        further = self._error_trailers.get(method.partition("/")[0], _no_trailers)

        async def handle_stream(requests: Any, grpc_context: Any) -> AsyncIterator[Any]:
            context = _Context(grpc_context)
            with _tracked_call(self._telemetry, method, context) as call:
                async with _errors_as_statuses(context, call, further):
                    checked = (accepted(request) async for request in requests)
                    async for response in behavior(checked, context):
                        yield response

        return handle_stream


class _Context:
    """Wraps the gRPC context so that a write to a disconnected client raises CancelledError.

    gRPC fails the write first, with an internal error, and delivers the cancellation later. Without the wrapper, a
    client that disconnects while a message waits to be read, or whose deadline passes while it is rejected, would count
    as a server error.
    """

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        with _disconnect_is_cancellation():
            await self._context.write(message)

    async def abort(self, *status: Any) -> NoReturn:
        with _disconnect_is_cancellation():
            await self._context.abort(*status)
        raise AssertionError("abort always raises")


@contextmanager
def _disconnect_is_cancellation() -> Iterator[None]:
    try:
        yield
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


@contextmanager
def _tracked_call(telemetry: Telemetry, method: str, context: Any) -> Iterator[Call]:
    """Track a call from its request to its status, during the body."""
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
        code = "UNKNOWN"  # gRPC's status for any other exception
        raise
    finally:
        call.finish(code)


@asynccontextmanager
async def _errors_as_statuses(context: _Context, call: Call, further: ErrorTrailers) -> AsyncIterator[None]:
    """End the call with the status of the error that the body raises, and its further trailers."""
    try:
        yield
    except ServiceError as error:
        await _abort(context, error, call, further)
    except grpc.aio.AbortError:
        raise
    except Exception as error:
        # The log has the place and not the exception's message, which may quote the request.
        logger.error("request %s failed", call.request_id, exc_info=error)  # noqa: TRY400
        await _abort(context, InternalError(), call, further)


async def _abort(context: _Context, error: ServiceError, call: Call, further: ErrorTrailers) -> NoReturn:
    call.error = error
    message, trailers = error.to_status(call.request_id, context.time_remaining())
    await context.abort(error.code, message, (*trailers, *further(error)))


def _no_trailers(error: ServiceError) -> list[tuple[str, str | bytes]]:
    return []


def _expiry(context: Any) -> Callable[[], bool]:
    """Return a function that decides whether a call that its client ended has expired.

    The client's timer ends the call slightly before the server's: gRPC rounds the timeout up by about 1% on the wire.
    """
    timeout = context.time_remaining()
    if timeout is None:
        return lambda: False
    return lambda: bool(context.time_remaining() <= 0.02 * timeout + 0.02)


def _status_name(code: Any) -> str:
    """Return the name of a context's status; grpc.aio keeps it as a number."""
    return code.name if isinstance(code, grpc.StatusCode) else STATUS_NAMES.get(code, "UNKNOWN")


def _text(method: str | bytes) -> str:
    return method.decode() if isinstance(method, bytes) else method
