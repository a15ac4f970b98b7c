"""ModelService: the model card that the server uses."""

from typing import Any

from llama2.v1 import model_pb2, model_pb2_grpc
from llama2_server.card import SAMPLING_RANGES, ModelCard
from llama2_server.usage.pricing import decimal_text


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Serves the model card as one message, which is built once."""

    def __init__(self, card: ModelCard) -> None:
        self._card_message = _card_message(card)

    async def GetModelCard(
        self, request: model_pb2.GetModelCardRequest, context: Any
    ) -> model_pb2.GetModelCardResponse:
        """Return the card as a message."""
        return model_pb2.GetModelCardResponse(model_card=self._card_message)


def _card_message(card: ModelCard) -> model_pb2.ModelCard:
    config = card.constellation_config
    return model_pb2.ModelCard(
        id=card.id,
        name=card.name,
        display_name=card.display_name,
        description=card.description,
        task=model_pb2.ModelTask(**card.task.model_dump()),
        tags=card.tags,
        properties=[model_pb2.Property(**entry.model_dump()) for entry in card.properties],
        limits=model_pb2.Limits(
            context_length_limit=card.context_length_limit,
            sequence_length_limit=card.sequence_length_limit,
            max_concurrent_requests=card.max_concurrent_requests,
        ),
        quota=model_pb2.Quota(max_requests_per_min=config.max_requests_per_min.default),
        prices=[
            model_pb2.Price(metric=metric.name, neuron_cost=decimal_text(metric.neuron_cost))
            for metric in config.neurons.metrics
        ],
        generation_defaults=model_pb2.GenerationDefaults(
            max_tokens=card.default_max_tokens,
            **{name: getattr(card.generation_config, name) for name in SAMPLING_RANGES},
        ),
        input_schema=card.input_schema,
        output_schema=card.output_schema,
    )
