"""A service with a scripted model, and helpers for tests that call it."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from tests.support.scripted_model import ScriptedModel

from llama2.v1 import model_pb2_grpc, text_generation_pb2_grpc
from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard
from llama2_server.telemetry.metrics import Metrics


@dataclass(frozen=True)
class Service:
    """A running service, with stubs that call it over a real socket."""

    address: str
    model: ScriptedModel
    channel: grpc.aio.Channel
    text: "text_generation_pb2_grpc.TextGenerationServiceAsyncStub"
    models: "model_pb2_grpc.ModelServiceAsyncStub"
    metrics: Metrics

    @property
    def port(self) -> int:
        """Return the port that the service listens on."""
        return int(self.address.rpartition(":")[2])

    def finished_calls(self, code: str) -> int:
        """Return the number of finished calls with this code, as the server counts them."""
        families = self.metrics.registry.collect()
        samples = (sample for family in families for sample in family.samples if sample.name == "llama2_requests_total")
        return int(sum(sample.value for sample in samples if sample.labels["code"] == code))

    async def wait_until_queued(self, calls: int) -> None:
        """Wait until exactly this many calls are queued: a new call takes a while to arrive."""
        await until(lambda: self.metrics.registry.get_sample_value("llama2_requests_queued") == calls)

    async def wait_until_in_step(self) -> None:
        """Wait until the gated model is in a step that needs a permit."""
        await until(self.model.in_step.is_set)


UnaryStream = Any  # grpc.aio's call classes accept no type arguments at run time
Cancellable = Any  # a call, or the task that awaits its reply
ServiceMaker = Callable[..., AbstractAsyncContextManager[Service]]

# Options of a channel with which the server soon has to wait for the reader.
SMALL_WINDOWS = [("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0)]

# Servers on one port of several hosts, like the pods of a headless Kubernetes service.
ONE_PORT_HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
needs_one_port_hosts = pytest.mark.skipif(
    sys.platform != "linux", reason="NOT TESTED WITH ONE NAME FOR SEVERAL SERVERS: only Linux has 127.0.0.2 by default"
)


@asynccontextmanager
async def three_services(serve: ServiceMaker, folder: Path) -> AsyncIterator[list[Service]]:
    """Run three services, on the same port of each of `ONE_PORT_HOSTS`."""
    async with AsyncExitStack() as stack:
        services: list[Service] = []
        for host in ONE_PORT_HOSTS:
            listen = f"{host}:{services[0].port if services else 0}"
            services.append(await stack.enter_async_context(serve(listen=listen, data_directory=folder / host)))
        yield services


def prefills(services: Sequence[Service]) -> list[int]:
    """Return the number of prompts that each service's model has processed."""
    return [service.model.prefills for service in services]


def with_config(card: ModelCard, **changes: object) -> ModelCard:
    """Return the card with these changes to its constellation_config."""
    return card.model_copy(update={"constellation_config": card.constellation_config.model_copy(update=changes)})


def health_stub(channel: grpc.aio.Channel | grpc.Channel) -> Any:
    """Return the stub of the health service; its published types have no methods."""
    return health_pb2_grpc.HealthStub(channel)


def reflection_stub(channel: grpc.aio.Channel) -> Any:
    """Return the stub of the reflection service."""
    make: Any = reflection_pb2_grpc.ServerReflectionStub
    return make(channel)


async def until(condition: Callable[[], bool], timeout_seconds: float = 60) -> None:
    """Run the event loop until a condition holds; the timeout only ends a test that hangs."""
    async with asyncio.timeout(timeout_seconds):
        while not condition():
            await asyncio.sleep(0)


async def wait_for_health(service: Service, expected: int, name: str = "") -> None:
    """Wait until the health service reports this state of a name."""
    watch = health_stub(service.channel).Watch(health_pb2.HealthCheckRequest(service=name))
    try:
        async with asyncio.timeout(60):
            async for response in watch:
                if response.status == expected:
                    return
        raise AssertionError("the watch ended")
    finally:
        watch.cancel()


def details(error: grpc.aio.AioRpcError) -> dict[str, Message]:
    """Return the google.rpc details of an error by type; each error has an ErrorInfo."""
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    found: dict[str, Message] = {}
    for packed in status.details:
        kind = packed.TypeName().removeprefix("google.rpc.")
        detail = getattr(error_details_pb2, kind)()
        assert packed.Unpack(detail)
        found[kind] = detail
    assert found["ErrorInfo"].domain == "llama2.v1"  # type: ignore[attr-defined]
    assert sum(len(key) + len(value) for key, value in error.trailing_metadata()) < 4096
    return found


async def remaining_text(call: UnaryStream) -> str:
    """Read a stream to its end, and return the text."""
    text = ""
    while isinstance(message := await call.read(), pb.GenerateStreamResponse):
        text += message.response
    return text


async def generate(service: Service, prompt: str, max_tokens: int) -> pb.GenerateResponse:
    """Return a whole reply."""
    request = pb.GenerateRequest(prompt=prompt, max_tokens=max_tokens)
    reply: pb.GenerateResponse = await service.text.Generate(request)
    return reply


async def hold_slot(
    service: Service, prompt: str = "hold", *, metadata: tuple[tuple[str, str], ...] = (), **options: Any
) -> UnaryStream:
    """Return a call that holds the only slot: its first token is read, and the model is in its second step."""
    service.model.gate()
    service.model.allow(1)
    call: UnaryStream = service.text.GenerateStream(pb.GenerateRequest(prompt=prompt, **options), metadata=metadata)
    await call.read()
    await service.wait_until_in_step()
    return call


async def disconnect(service: Service, *calls: Cancellable) -> None:
    """Cancel calls, and wait until the server has finished them: `cancel` returns before the server is notified."""
    finished = service.finished_calls("CANCELLED") + len(calls)
    for call in calls:
        call.cancel()
    await until(lambda: service.finished_calls("CANCELLED") == finished)
