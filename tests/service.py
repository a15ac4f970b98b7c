"""A whole service on a scripted model, and what tests need to talk to it."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import grpc.aio
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from tests.scripted_model import ScriptedModel

from llama2.v1 import model_pb2_grpc, text_generation_pb2_grpc
from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard


@dataclass(frozen=True)
class Service:
    """A service that listens, and stubs for it over a real socket."""

    address: str
    model: ScriptedModel
    channel: grpc.aio.Channel
    text: "text_generation_pb2_grpc.TextGenerationServiceAsyncStub"
    models: "model_pb2_grpc.ModelServiceAsyncStub"


UnaryStream = Any  # grpc.aio's call classes take no type arguments at run time
ServiceMaker = Callable[..., AbstractAsyncContextManager[Service]]


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


async def text_of(call: UnaryStream) -> str:
    """What is left of a stream, to its end."""
    text = ""
    while isinstance(message := await call.read(), pb.GenerateStreamResponse):
        text += message.response
    return text


async def hold_the_slot(service: Service, prompt: str = "hold") -> UnaryStream:
    """A call that holds the only slot, its first token read, the model waiting before the second."""
    service.model.gate()
    service.model.allow(1)
    call: UnaryStream = service.text.GenerateStream(pb.GenerateRequest(prompt=prompt))
    await call.read()
    await asyncio.to_thread(service.model.in_step.wait, 10)
    return call
