"""The health port: a port without TLS for the probes of Kubernetes."""

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tests.support.certificates import Authority
from tests.support.processes import free_port
from tests.support.service import ServiceMaker, health_stub, reflection_stub

from llama2.v1 import model_pb2, model_pb2_grpc
from llama2_server.api.server import health_port
from llama2_server.config.settings import Settings

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_health_port_serves_health_only() -> None:
    """The port serves Check and Watch without TLS, no other service and no reflection."""
    settings = Settings.model_validate({"health_listen": "127.0.0.1:0"})
    async with health_port(settings) as health:
        assert health.address is not None
        async with grpc.aio.insecure_channel(health.address) as channel:
            stub = health_stub(channel)
            assert (await stub.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
            assert (await stub.Check(health_pb2.HealthCheckRequest(service="liveness"))).status == SERVING
            health.servicer.set_serving(True)
            for name in ("", "llama2.v1.TextGenerationService"):
                assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == SERVING
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await model_pb2_grpc.ModelServiceStub(channel).GetModelCard(model_pb2.GetModelCardRequest())
            assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
            call = reflection_stub(channel).ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_port_has_no_tls(serve_scripted: ServiceMaker, authority: Authority) -> None:
    """With TLS on the port of the services, the health port answers without TLS, with the status of the same server."""
    certificate, key = authority.pair()
    health = f"127.0.0.1:{free_port()}"
    async with (
        serve_scripted(tls_certificate=certificate, tls_key=key, health_listen=health),
        grpc.aio.insecure_channel(health) as channel,
    ):
        assert (await health_stub(channel).Check(health_pb2.HealthCheckRequest())).status == SERVING
