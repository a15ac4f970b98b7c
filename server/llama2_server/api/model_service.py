"""ModelService: the model card that the server uses, and how it runs the model."""

from typing import Any, NamedTuple

import yaml

from llama2.v1 import model_pb2, model_pb2_grpc
from llama2_server.admission.accounts import Authenticator
from llama2_server.admission.quota import Quota
from llama2_server.card import SAMPLING_RANGES, ModelCard, Property
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.engine.step_runner import StepKind
from llama2_server.errors import AccountDisabled, Unauthenticated
from llama2_server.receipts.keys import ReceiptKeys
from llama2_server.telemetry.call import CALL
from llama2_server.usage.pricing import decimal_text

STEP_KINDS = {
    StepKind.NATIVE: model_pb2.STEP_KIND_NATIVE,
    StepKind.TORCH: model_pb2.STEP_KIND_TORCH,
    StepKind.CUDA_GRAPHS: model_pb2.STEP_KIND_CUDA_GRAPHS,
}


class Execution(NamedTuple):
    """How the server runs the model."""

    device: str
    """A torch device, such as "cpu" or "cuda:0"."""
    dtype: str
    """The precision of the weights, such as "float16"."""
    step: StepKind
    kernels: str
    """The family of the native kernels, portable or amx; empty with other kinds of steps."""
    fingerprint: Fingerprint
    receipt_keys: ReceiptKeys | None


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Serves the model card, which is built once, and the quota of the calling account."""

    def __init__(self, card: ModelCard, authenticator: Authenticator, quota: Quota, execution: Execution) -> None:
        self._card_message = _card_message(card)
        self._execution = execution
        self._authenticator = authenticator
        self._quota = quota

    async def GetModelCard(
        self, request: model_pb2.GetModelCardRequest, context: Any
    ) -> model_pb2.GetModelCardResponse:
        """Return the card, with the limits of the calling account if the call identifies one."""
        execution = _execution_message(self._execution)
        response = model_pb2.GetModelCardResponse(
            model_card=self._card_message, execution=execution, receipt_keys=_receipt_keys(self._execution.receipt_keys)
        )
        try:
            account = self._authenticator.authenticate(context.invocation_metadata())
        except (Unauthenticated, AccountDisabled):
            return response
        CALL.get().account_id = account.id
        response.model_card.quota.account_max_requests_per_min = self._quota.limit(account.id)
        budget = self._authenticator.limits(account.id).neurons_per_month
        if budget is not None:
            response.model_card.quota.account_neurons_per_month = decimal_text(budget)
        return response


def _execution_message(execution: Execution) -> model_pb2.Execution:
    inputs = sorted(execution.fingerprint.inputs.items())
    return model_pb2.Execution(
        device=execution.device,
        dtype=execution.dtype,
        step_kind=STEP_KINDS[execution.step],
        kernels=execution.kernels,
        fingerprint=execution.fingerprint.value,
        fingerprint_inputs=[model_pb2.FingerprintInput(name=name, value=value) for name, value in inputs],
    )


def _receipt_keys(keys: ReceiptKeys | None) -> list[model_pb2.ReceiptKey]:
    listed = () if keys is None else keys.listed
    return [model_pb2.ReceiptKey(key_id=key.key_id, public_key=key.raw) for key in listed]


def _card_message(card: ModelCard) -> model_pb2.ModelCard:
    config = card.constellation_config
    return model_pb2.ModelCard(
        id=card.id,
        name=card.name,
        display_name=card.display_name,
        description=card.description,
        task=model_pb2.ModelTask(**card.task.model_dump()),
        tags=card.tags,
        properties=[
            model_pb2.Property(property_id=entry.property_id, value=_public(entry)) for entry in card.properties
        ],
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


def _public(entry: Property) -> str:
    """Return a property's value without the quotas of single accounts, which only these accounts may read."""
    if entry.property_id != "constellation_config":
        return entry.value
    config: dict[str, Any] = yaml.safe_load(entry.value)
    quota: dict[str, Any] = config["max_requests_per_min"]
    if "accounts" not in quota:
        return entry.value
    del quota["accounts"]
    return yaml.safe_dump(config, sort_keys=False).rstrip()
