"""A gRPC proxy that relays the bytes of every method, and applies one mutant."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pool, symbol_database
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from conformance.mutants.behavior import Call, Failure, Mutant, ProxyKeys
from llama2.v1 import account_pb2, model_pb2, text_generation_pb2

OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_retries", 0),
    ("grpc.max_metadata_size", 64 * 1024),
    ("grpc.use_local_subchannel_pool", 1),
]
# Their types are found by name, so the modules must be imported.
IMPORTED = (health_pb2, reflection_pb2, account_pb2, model_pb2, text_generation_pb2)


class Proxy(grpc.GenericRpcHandler):
    """The proxy; `mutant` and `state` are replaced before each run of a case."""

    def __init__(self, address: str, keys: ProxyKeys) -> None:
        self.mutant: Mutant | None = None
        self.state: dict[str, Any] = {}
        self._keys = keys
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._draining: set[asyncio.Task[None]] = set()

    def use(self, mutant: Mutant | None) -> None:
        """Apply a mutant to the following calls."""
        self.mutant, self.state = mutant, {}

    async def stop_draining(self) -> None:
        """Cancel the calls that continue after their client's cancel."""
        for task in list(self._draining):
            task.cancel()
        await asyncio.gather(*self._draining, return_exceptions=True)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of any method."""
        path = handler_call_details.method

        async def handle(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            data = b"".join([request async for request in requests])
            timeout, metadata = context.time_remaining(), list(context.invocation_metadata() or ())
            kept = [(key, value) for key, value in metadata if key not in {"user-agent", "grpc-accept-encoding"}]
            request = parse(path, data, "input_type")
            # Envoy's health checks need the correct server.
            hidden = any("envoy" in str(value).lower() for key, value in metadata if key == "user-agent")
            call = Call(path, data, request, kept, timeout, self._keys, self.state, self.send)
            try:
                async for message in self.send(call) if hidden else self._run(call):
                    yield message if isinstance(message, bytes) else message.SerializeToString()
            except Failure as failure:
                if self.mutant is not None and self.mutant.error is not None and self.mutant.applies(call.method):
                    self.mutant.error(call, failure)
                context.set_trailing_metadata(failure.trailers)
                await context.abort(grpc.StatusCode[failure.code], failure.message)

        return grpc.stream_stream_rpc_method_handler(handle)

    async def _run(self, call: Call) -> AsyncIterator[Any]:
        mutant = self.mutant
        if mutant is None or not mutant.applies(call.method) or (mutant.call is not None and call.request is None):
            mutant = None
        if mutant is not None and mutant.call is not None:
            waiting = mutant.call(call)
            if waiting is not None:
                await waiting
        if mutant is not None and mutant.data is not None:
            mutant.data(call)
        async for message in self.send(call):
            if mutant is None or mutant.reply is None or isinstance(message, bytes):
                yield message
                continue
            replaced = mutant.reply(call, message)
            for one in [message] if replaced is None else replaced:
                yield one

    async def send(self, call: Call) -> AsyncIterator[Any]:
        """Make the call on the correct server and yield its messages, parsed if their type is known."""
        data = call.data if call.request is None else call.request.SerializeToString()
        multi: Any = self._channel.unary_stream(call.path)
        upstream = multi(data, timeout=call.timeout, metadata=call.metadata)
        # gRPC cancels a call whose reading task is cancelled, so that a call that must continue has its own task.
        messages = self._read_in_task(upstream) if call.drain_when_cancelled else upstream
        try:
            async for message in messages:
                yield parse(call.path, message, "output_type") or message
        except grpc.aio.AioRpcError as error:
            raise Failure(error.code().name, error.details() or "", list(error.trailing_metadata() or ())) from None
        except (asyncio.CancelledError, GeneratorExit):
            if not call.drain_when_cancelled:
                upstream.cancel()
            raise

    async def _read_in_task(self, upstream: Any) -> AsyncIterator[bytes]:
        received: asyncio.Queue[bytes | grpc.aio.AioRpcError | None] = asyncio.Queue()

        async def read() -> None:
            try:
                async for message in upstream:
                    received.put_nowait(message)
                received.put_nowait(None)
            except grpc.aio.AioRpcError as error:
                received.put_nowait(error)

        task = asyncio.create_task(read())
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)
        while (message := await received.get()) is not None:
            if not isinstance(message, bytes):
                raise message
            yield message

    async def close(self) -> None:
        """Disconnect."""
        await self._channel.close()


def parse(path: str, data: bytes, side: str) -> Message | None:
    """Return the request (`input_type`) or a response (`output_type`) of a method; None if it cannot be parsed.

    A message that the protobuf library would print with other bytes is not parsed, so that it is relayed unchanged.
    """
    service, _, method = path.strip("/").rpartition("/")
    try:
        name = service.replace("reflection.v1.", "reflection.v1alpha.")
        descriptor = descriptor_pool.Default().FindServiceByName(name).methods_by_name[method]
        kind = symbol_database.Default().GetSymbol(getattr(descriptor, side).full_name)
        message: Message = kind.FromString(data)
        return message if message.ByteSize() == len(data) and service.startswith(("llama2", "grpc")) else None
    except (KeyError, DecodeError, AttributeError):
        return None


@asynccontextmanager
async def running_proxy(proxy: Proxy, *options: tuple[str, int]) -> AsyncIterator[str]:
    """Serve the proxy on a free loopback port, and yield its address."""
    server = grpc.aio.server(options=[*OPTIONS, *options])
    server.add_generic_rpc_handlers((proxy,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)
