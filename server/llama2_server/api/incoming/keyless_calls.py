"""Limit the memory of calls without a valid API key: health, reflection and GetModelCard, which need none.

Their handlers read the message themselves. gRPC would read it before the handler of a unary call, and would keep a
message that never ends without any limit of such calls.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc.aio

from llama2_server.api.incoming.message_check import Handler, accepted
from llama2_server.errors import DeadlineExceeded, InvalidRequest, TooManyRequests, Violation

MAX_READING = 16
"""Maximum number of calls whose message is incomplete; each can hold a message of gRPC's limit."""
READ_SECONDS = 10.0
"""Maximum time until the message is complete."""
RETRY_SECONDS = 1.0


class KeylessCalls:
    """The open calls without a valid key: `max_calls`, and beyond that one on each connection.

    A call is open until its status is sent, because a client that accepts no data keeps the reply in memory. The call
    that each connection always has is the health check or watch of a client or a load balancer: other clients cannot
    lock it out.
    """

    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self._by_connection: Counter[str] = Counter()
        self._reading: dict[asyncio.Task[Any], None] = {}  # in the order of their arrival

    def __len__(self) -> int:
        return self._by_connection.total()

    def reading(self, behavior: Handler) -> Handler:
        """Return a handler with a request stream, which reads one message and passes it to `behavior`."""

        async def handle(requests: Any, context: Any) -> Any:
            self.open(context)
            with self._read():
                message = await _message(context)
            return await behavior(message, context)

        return handle

    def open(self, context: Any) -> None:
        """Count a call from now until its status is sent.

        Raises:
            TooManyRequests: there are too many calls, and another one of this connection.
        """
        connection = context.peer()
        if len(self) >= self._max_calls and self._by_connection[connection]:
            raise _too_many()
        self._by_connection[connection] += 1
        context.add_done_callback(lambda _: self._close(connection))

    def _close(self, connection: str) -> None:
        self._by_connection[connection] -= 1
        if not self._by_connection[connection]:
            del self._by_connection[connection]

    @contextmanager
    def _read(self) -> Iterator[None]:
        """Read a message in the body; a message that began earlier gives way if there are too many."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call runs in a task")
        if len(self._reading) >= MAX_READING:
            oldest = next(iter(self._reading))
            del self._reading[oldest]
            oldest.cancel()
        self._reading[task] = None
        try:
            yield
        except asyncio.CancelledError:
            if task in self._reading:
                raise
            task.uncancel()
            raise _too_many() from None
        finally:
            self._reading.pop(task, None)


async def _message(context: Any) -> Any:
    """Return the message of a call with one message."""
    try:
        async with asyncio.timeout(READ_SECONDS):
            message = await context.read()
    except TimeoutError:
        raise DeadlineExceeded(f"the request message is not complete after {READ_SECONDS:g} s") from None
    if message is grpc.aio.EOF:
        raise InvalidRequest([Violation("", "the call has no request message")])
    return accepted(message)


def _too_many() -> TooManyRequests:
    return TooManyRequests("too many calls without a valid API key are open; send one with each call", RETRY_SECONDS)
