"""A whole service on a scripted model, and what tests need to talk to it."""

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
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from tests.support.scripted_model import ScriptedModel

from llama2.v1 import model_pb2_grpc, text_generation_pb2_grpc
from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard
from llama2_server.telemetry.metrics import Metrics


@dataclass(frozen=True)
class Service:
    """A service that listens, and stubs for it over a real socket."""

    address: str
    model: ScriptedModel
    channel: grpc.aio.Channel
    text: "text_generation_pb2_grpc.TextGenerationServiceAsyncStub"
    models: "model_pb2_grpc.ModelServiceAsyncStub"
    metrics: Metrics

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.address.rpartition(":")[2])

    def finished_calls(self, code: str) -> int:
        """How many calls have ended with this code, by the server's own count."""
        families = self.metrics.registry.collect()
        samples = [one for family in families for one in family.samples if one.name == "llama2_requests_total"]
        return int(sum(one.value for one in samples if one.labels["code"] == code))

    async def wait_until_queued(self, calls: int) -> None:
        """Wait until this many calls wait for a slot: one that was begun may still be on its way."""
        await until(lambda: self.metrics.registry.get_sample_value("llama2_requests_queued") == calls)


UnaryStream = Any  # grpc.aio's call classes take no type arguments at run time
Cancellable = Any  # one of them, or the task that awaits its reply
ServiceMaker = Callable[..., AbstractAsyncContextManager[Service]]

# Several servers on one port, as the pods of a headless service are.
ONE_PORT_HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
needs_one_port_hosts = pytest.mark.skipif(
    sys.platform != "linux", reason="NOT TESTED WITH ONE NAME FOR SEVERAL SERVERS: only Linux has 127.0.0.2 as it is"
)


@asynccontextmanager
async def three_services(serve: ServiceMaker, folder: Path) -> AsyncIterator[list[Service]]:
    """Services on one port of each of `ONE_PORT_HOSTS`."""
    async with AsyncExitStack() as stack:
        services: list[Service] = []
        for host in ONE_PORT_HOSTS:
            listen = f"{host}:{services[0].port if services else 0}"
            services.append(await stack.enter_async_context(serve(listen=listen, data_directory=folder / host)))
        yield services


def prefills(services: Sequence[Service]) -> list[int]:
    """How many calls each service's model has begun."""
    return [service.model.prefills for service in services]


def with_config(card: ModelCard, **changes: object) -> ModelCard:
    """A card with another constellation_config."""
    return card.model_copy(update={"constellation_config": card.constellation_config.model_copy(update=changes)})


def health_stub(channel: grpc.aio.Channel | grpc.Channel) -> Any:
    """The health service's stub; its published types know no methods."""
    return health_pb2_grpc.HealthStub(channel)


def reflection_stub(channel: grpc.aio.Channel) -> Any:
    """The reflection service's stub."""
    make: Any = reflection_pb2_grpc.ServerReflectionStub
    return make(channel)


def server_deadline(milliseconds: int) -> tuple[tuple[str, str], ...]:
    """Metadata with a deadline that the server's timer keeps alone.

    A caller's own timer ends the call too, and on a busy machine so early that the server takes it for a cancel.
    """
    return (("grpc-timeout", f"{milliseconds}m"),)


async def until(condition: Callable[[], bool], timeout_seconds: float = 10) -> None:
    """Let the event loop run until a condition holds; fails after the timeout."""
    async with asyncio.timeout(timeout_seconds):
        while not condition():
            await asyncio.sleep(0)


def details(error: grpc.aio.AioRpcError) -> dict[str, Message]:
    """The google.rpc details of a refusal by type, ErrorInfo checked: it is always there."""
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
    """What is left of a stream, to its end."""
    text = ""
    while isinstance(message := await call.read(), pb.GenerateStreamResponse):
        text += message.response
    return text


async def hold_slot(service: Service, prompt: str = "hold") -> UnaryStream:
    """A call that holds the only slot, its first token read, the model waiting before the second."""
    service.model.gate()
    service.model.allow(1)
    call: UnaryStream = service.text.GenerateStream(pb.GenerateRequest(prompt=prompt))
    await call.read()
    await asyncio.to_thread(service.model.in_step.wait, 10)
    return call


async def disconnect(service: Service, *calls: Cancellable) -> None:
    """Give calls up, and wait until the server has heard of it: a cancel is only on its way when `cancel` returns."""
    heard = service.finished_calls("CANCELLED") + len(calls)
    for call in calls:
        call.cancel()
    await until(lambda: service.finished_calls("CANCELLED") == heard)
