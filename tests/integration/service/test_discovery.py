"""Services that describe the server, over a real socket: health, reflection and the model card."""

from decimal import Decimal
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tests.support.service import ServiceMaker, health_stub, reflection_stub

from llama2.v1 import model_pb2
from llama2_server.card import ModelCard


async def test_health_of_server_and_services(serve_scripted: ServiceMaker) -> None:
    """The server ("") and each service are SERVING; an unknown service is NOT_FOUND."""
    async with serve_scripted() as service:
        stub = health_stub(service.channel)
        for name in ("", "llama2.v1.TextGenerationService", "llama2.v1.ModelService"):
            state = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert state.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await stub.Check(health_pb2.HealthCheckRequest(service="unknown"))
        assert rejected.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_can_be_disabled(serve_scripted: ServiceMaker) -> None:
    """With reflection off, the server does not have the reflection service."""
    async with serve_scripted(reflection=False) as service:
        stub = reflection_stub(service.channel)
        call = stub.ServerReflectionInfo()
        with pytest.raises(grpc.aio.AioRpcError):  # raised by the write, without the status, or by the read
            await _list_services(call)
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def _list_services(call: Any) -> None:
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    await call.read()


async def test_model_card_is_the_card(serve_scripted: ServiceMaker, demo_card: ModelCard) -> None:
    """GetModelCard returns identity, limits, prices and both schemas of the card that the server uses."""
    async with serve_scripted(card=demo_card) as service:
        card = (await service.models.GetModelCard(model_pb2.GetModelCardRequest())).model_card
        assert (card.id, card.name, card.description) == (demo_card.id, demo_card.name, demo_card.description)
        assert (card.task.name, list(card.tags)) == (demo_card.task.name, list(demo_card.tags))
        assert card.limits.context_length_limit == demo_card.context_length_limit
        assert card.limits.sequence_length_limit == demo_card.sequence_length_limit
        assert card.limits.max_concurrent_requests == demo_card.max_concurrent_requests
        assert card.quota.max_requests_per_min == demo_card.constellation_config.max_requests_per_min.default
        assert {price.metric: Decimal(price.neuron_cost) for price in card.prices} == demo_card.neuron_costs
        assert card.generation_defaults.max_tokens == demo_card.default_max_tokens
        assert card.generation_defaults.temperature == demo_card.generation_config.temperature
        assert (card.input_schema, card.output_schema) == (demo_card.input_schema, demo_card.output_schema)
        assert [entry.property_id for entry in card.properties] == [entry.property_id for entry in demo_card.properties]
        for sent, entry in zip(card.properties, demo_card.properties, strict=True):
            assert sent.value == entry.value or sent.property_id == "constellation_config"
