"""A gRPC server without sockets: it serves calls of the same process, with flow control, deadlines and cancellation.

It follows grpc.aio where the service depends on it: interceptors run before the message is read, an uncaught exception
becomes UNKNOWN with its text, and a write after the client has left fails with grpc.aio.InternalError.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from contextvars import copy_context
from typing import Any, NoReturn

import grpc
import grpc.aio

WINDOW_MESSAGES = 2
"""Messages that the server can send before the client reads one."""

Metadata = tuple[tuple[str, str | bytes], ...]
EOF = grpc.aio.EOF


class Details:
    """Stands for grpc.HandlerCallDetails."""

    def __init__(self, method: str, invocation_metadata: Metadata) -> None:
        self.method = method
        self.invocation_metadata = invocation_metadata


class InProcessCall:
    """A call, as its client sees it: `read` messages, `cancel`, and after the end the status."""

    def __init__(self, method: str, request: bytes, metadata: Metadata, timeout: float | None) -> None:
        self.method, self.request, self.metadata = method, request, metadata
        task = asyncio.current_task()
        self.peer = "" if task is None else task.get_name()  # each client is a task
        self.loop = asyncio.get_running_loop()
        self.deadline = None if timeout is None else self.loop.time() + timeout
        self.code: grpc.StatusCode | None = None
        self.message = ""
        self.trailers: dict[str, str | bytes] = {}
        self.sent: deque[bytes] = deque()
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self._timer = None if self.deadline is None else self.loop.call_at(self.deadline, self._expire)

    async def read(self) -> Any:
        """Return the next message as bytes, or EOF after the last one; the status is set then."""
        while not self.sent and self.code is None:
            await self._wait()
        if not self.sent:
            return EOF
        message = self.sent.popleft()
        self._notify()
        return message

    def cancel(self) -> None:
        """End the call as its client."""
        self._leave(grpc.StatusCode.CANCELLED, "Locally cancelled by application!")

    def end(self, code: grpc.StatusCode, message: str = "", trailers: Metadata = ()) -> None:
        """Set the status; only the first one counts."""
        if self.code is None:
            self.code, self.message, self.trailers = code, message, dict(trailers)
            if self._timer is not None:
                self._timer.cancel()
            self._notify()

    def break_off(self) -> None:
        """End the call because its connection has closed."""
        self._leave(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    async def write(self, message: bytes) -> None:
        """Send a message as the server, when the client has read enough."""
        while len(self.sent) >= WINDOW_MESSAGES and self.code is None:
            await self._wait()
        if self.code is not None:
            raise grpc.aio.InternalError("the client has left")
        self.sent.append(message)
        self._notify()

    def _expire(self) -> None:
        self._leave(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def _leave(self, code: grpc.StatusCode, message: str) -> None:
        if self.code is None:
            self.sent.clear()
            self.end(code, message)
            if self.task is not None:
                self.loop.call_later(0.001, self.task.cancel)

    async def _wait(self) -> None:
        await self.changed.wait()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Context:
    """Stands for the context of a servicer."""

    def __init__(self, call: InProcessCall, serializer: Any) -> None:
        self._call = call
        self._serializer = serializer
        self._code: grpc.StatusCode | None = None

    def invocation_metadata(self) -> Metadata:
        """Return the metadata of the request."""
        return self._call.metadata

    def peer(self) -> str:
        """Return the name of the client."""
        return self._call.peer

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline; None without one."""
        call = self._call
        return None if call.deadline is None else max(0.0, call.deadline - call.loop.time())

    def code(self) -> Any:
        """Return the status that `abort` has set."""
        return self._code

    async def write(self, message: Any) -> None:
        """Send a message."""
        await self._call.write(self._serializer(message))

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """End the call with a status."""
        if self._call.code is not None:
            raise grpc.aio.InternalError("the client has left")
        self._code = code
        self._call.end(code, details, trailing_metadata)
        raise grpc.aio.AbortError


class InProcessServer:
    """Stands for grpc.aio.Server."""

    def __init__(self, interceptors: Sequence[Any] = (), options: object = None) -> None:
        self._interceptor = interceptors[0]
        self._handlers: dict[str, Any] = {}
        self._calls: dict[InProcessCall, None] = {}
        self._idle = asyncio.Event()
        self._context = copy_context()
        self.serving = False

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Add the methods of a service."""
        self._handlers |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Do nothing: each service also registers its methods."""

    def add_insecure_port(self, address: str) -> int:
        """Return a port number."""
        return 1

    async def start(self) -> None:
        """Accept calls."""
        self.serving = True

    async def stop(self, grace: float | None) -> None:
        """Reject new calls, and end the running ones after the grace period."""
        self.serving = False
        deadline = asyncio.get_running_loop().time() + (grace or 0)
        try:
            async with asyncio.timeout_at(deadline):
                while self._calls:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            self.break_off()

    def break_off(self) -> None:
        """End all calls, as the end of the process does."""
        self.serving = False
        for call in list(self._calls):
            call.break_off()

    def call(self, call: InProcessCall) -> None:
        """Serve a call in the context in which the server was created."""
        if not self.serving:
            call.end(grpc.StatusCode.UNAVAILABLE, "failed to connect")
            return
        self._calls[call] = None
        call.task = asyncio.create_task(self._serve(call), context=self._context.copy())
        call.task.add_done_callback(lambda task: self._ended(call, task))

    def _ended(self, call: InProcessCall, task: "asyncio.Task[None]") -> None:
        del self._calls[call]
        if not task.cancelled() and (error := task.exception()) is not None:
            # AbortError has set the status.
            call.end(grpc.StatusCode.UNKNOWN, f"Unexpected {type(error)}: {error}")
        self._idle.set()

    async def _serve(self, call: InProcessCall) -> None:
        async def continuation(details: Details) -> Any:
            return self._handlers.get(details.method)

        handler = await self._interceptor.intercept_service(continuation, Details(call.method, call.metadata))
        if handler is None:
            call.end(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
            return
        context = Context(call, handler.response_serializer)
        if handler.stream_unary is not None:  # it reads no message
            await handler.stream_unary(None, context)
            return
        request = handler.request_deserializer(call.request)
        if handler.unary_unary is not None:
            response = handler.response_serializer(await handler.unary_unary(request, context))
            if call.code is None:
                call.sent.append(response)
        else:
            await handler.unary_stream(request, context)
        call.end(grpc.StatusCode.OK)
