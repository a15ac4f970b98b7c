"""`SyncClient`: Ctrl-C at each point of a wait."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from types import FrameType
from typing import Any, Self

import grpc
import pytest

from llama2.v1 import text_generation_pb2_grpc
from llama2_client import SyncClient

WAIT = threading.Condition.wait.__code__
POINTS = 45
"""The lines of three waits, of which the last one is gRPC's."""
CALLS: dict[str, Callable[[SyncClient], object]] = {
    "generate": lambda client: client.generate("Hi"),
    "stream": lambda client: list(client.stream("Hi")),
    "count_tokens": lambda client: client.count_tokens("Hi"),
}


class HangingServer(text_generation_pb2_grpc.TextGenerationServiceServicer):
    """A server whose calls last until the client cancels them."""

    def __init__(self) -> None:
        self.started = 0
        self.idle = threading.Event()
        self._open: set[grpc.ServicerContext] = set()
        self._lock = threading.Lock()

    def Generate(self, request: object, context: grpc.ServicerContext) -> Any:
        """Wait for the cancellation."""
        ended = threading.Event()
        with self._lock:
            self.started += 1
            self._open.add(context)
            self.idle.clear()
        if context.add_callback(ended.set):  # false if the call has ended
            ended.wait()
        with self._lock:
            self._open.remove(context)
            if not self._open:
                self.idle.set()

    CountTokens = Generate

    def GenerateStream(self, request: object, context: grpc.ServicerContext) -> Iterator[Any]:
        """Wait for the cancellation."""
        self.Generate(request, context)
        yield from ()


class Interrupt:
    """Raises KeyboardInterrupt in `Condition.wait` of the main thread, before it executes line number `point`."""

    def __init__(self, point: int) -> None:
        self._lines_left = point
        self.raised = False

    def __enter__(self) -> Self:
        self._earlier = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._earlier)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        if frame.f_code is not WAIT:
            return None
        if event == "line":
            self._lines_left -= 1
            if self._lines_left < 0 and not self.raised:
                self.raised = True
                raise KeyboardInterrupt
        return self._trace


@pytest.fixture
def hanging() -> Iterator[tuple[HangingServer, str]]:
    """A hanging server and its address."""
    servicer = HangingServer()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    text_generation_pb2_grpc.add_TextGenerationServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(grace=None).wait()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_ctrl_c_at_each_point_of_a_wait(
    hanging: tuple[HangingServer, str], call: Callable[[SyncClient], object]
) -> None:
    """KeyboardInterrupt is raised, never the RuntimeError of a lock that is released twice, and the call ends."""
    servicer, address = hanging
    with SyncClient(address, timeout=None) as client:
        for point in range(POINTS):
            with pytest.raises(KeyboardInterrupt), Interrupt(point):
                call(client)
    assert servicer.started
    assert servicer.idle.wait(60)
