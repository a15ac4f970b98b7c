"""Every method of the served descriptors, on both ports: none answers INTERNAL, UNKNOWN or UNIMPLEMENTED."""

from collections.abc import Iterator
from typing import Any

import grpc.aio
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from tests.support.processes import free_port
from tests.support.service import ServiceMaker, health_stub

from llama2_server.api.health import LIVENESS, QUOTA_STORE, USAGE_STORE
from llama2_server.api.reflection import REFLECTION_SERVICES, described_files
from llama2_server.api.server import HEALTH_SERVICE, SERVICES
from llama2_server.card import load_card

FAULTS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED}
LIMIT = 4096


def methods(*services: str) -> Iterator[MethodDescriptor]:
    """Yield the methods of services, from the descriptors that reflection serves."""
    pool = DescriptorPool()
    for file in described_files():
        pool.AddSerializedFile(file.SerializeToString())
    for service in services:
        yield from pool.FindServiceByName(service).methods


def messages(method: MethodDescriptor) -> dict[str, bytes]:
    """Return an ordinary request of a method and unusual ones."""
    ordinary: Any = GetMessageClass(method.input_type)()
    if "prompt" in method.input_type.fields_by_name:
        ordinary.prompt = "Hi"
    if "model" in method.input_type.fields_by_name:
        ordinary.model, ordinary.body.data = load_card("demo").name, b'{"prompt": "Hi"}'
    return {
        "ordinary": ordinary.SerializeToString(),
        "empty": b"",
        "malformed": b"\xff\xff",
        "unknown field": b"\xfa\x7f\x03abc",
        "too large": b"\xfa\x7f\x88\x27" + b"a" * 5000,
    }


async def code_of(channel: grpc.aio.Channel, method: MethodDescriptor, message: bytes) -> grpc.StatusCode:
    """Return the status of a call; a stream counts as OK after its first message, because a watch does not end."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    untyped: Any = channel
    try:
        if not method.server_streaming:
            await untyped.unary_unary(path)(message, timeout=30)
            return grpc.StatusCode.OK
        if method.client_streaming:
            call = untyped.stream_stream(path)(iter([message]), timeout=30)
        else:
            call = untyped.unary_stream(path)(message, timeout=30)
        assert isinstance(await call.read(), bytes)
        call.cancel()
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def walk(address: str, *services: str) -> dict[str, grpc.StatusCode]:
    """Return the status of each method for each message."""
    codes = {}
    async with grpc.aio.insecure_channel(address) as channel:
        for method in methods(*services):
            for kind, message in messages(method).items():
                codes[f"{method.full_name} {kind}"] = await code_of(channel, method, message)
    return codes


async def test_no_method_fails(serve_scripted: ServiceMaker, caplog: pytest.LogCaptureFixture) -> None:
    """An ordinary request succeeds, malformed and too large ones are INVALID_ARGUMENT, and no error is logged."""
    health = f"127.0.0.1:{free_port()}"
    async with serve_scripted(health_listen=health, max_message_bytes=LIMIT) as service:
        main = await walk(service.address, *SERVICES, HEALTH_SERVICE, *REFLECTION_SERVICES)
        probes = await walk(health, HEALTH_SERVICE)
    for codes in (main, probes):
        assert {name: code for name, code in codes.items() if code in FAULTS} == {}
        assert {code for name, code in codes.items() if name.endswith("ordinary")} == {grpc.StatusCode.OK}
        bad = {code for name, code in codes.items() if name.endswith(("malformed", "too large"))}
        assert bad == {grpc.StatusCode.INVALID_ARGUMENT}
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_health_list_agrees_with_check(serve_scripted: ServiceMaker) -> None:
    """On both ports, List has the server, each service, liveness and the stores, in the state that Check returns."""
    (method,) = (method for method in methods(HEALTH_SERVICE) if method.name == "List")
    health = f"127.0.0.1:{free_port()}"
    async with serve_scripted(health_listen=health) as service:
        for address in (service.address, health):
            async with grpc.aio.insecure_channel(address) as channel:
                list_all: Any = channel.unary_unary(
                    f"/{HEALTH_SERVICE}/List", None, GetMessageClass(method.output_type).FromString
                )
                listed = {name: entry.status for name, entry in (await list_all(b"")).statuses.items()}
                check = health_stub(channel).Check
                checked = {name: (await check(health_pb2.HealthCheckRequest(service=name))).status for name in listed}
            assert listed == checked
            assert set(listed) == {"", *SERVICES, LIVENESS, QUOTA_STORE, USAGE_STORE}
