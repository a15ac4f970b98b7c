"""GetModelCard and quotas: the default for all, the caller's own for the caller, another account's for no one else."""

from decimal import Decimal
from pathlib import Path

import pytest
import yaml
from tests.support.scripted_model import ScriptedModel
from tests.support.service import ServiceMaker

from llama2.v1 import model_pb2, text_generation_pb2
from llama2_server.admission.accounts import ApiKeyAuthenticator
from llama2_server.admission.keys.keys_file import new_key
from llama2_server.card import ModelCard, load_card, parse_card
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.engine.step_runner import StepKind

LISTED, OTHER, UNLISTED = "32118455", "50147400", "7"
SECRET_LIMITS = {LISTED: 6001, OTHER: 6002}


@pytest.fixture
def card(tmp_path: Path) -> ModelCard:
    """The demo card with two accounts in its quotas, and a comment that names one of them."""
    shipped = load_card("demo")
    document = {
        "infer_response_cache": None,
        "max_requests_per_min": {"default": 5, "accounts": SECRET_LIMITS},
        "neurons": {"metrics": [{"name": "input_tokens", "neuron_cost": 0.3672}]},
        "max_concurrent_requests": 1,
    }
    text = f"{yaml.safe_dump(document, sort_keys=False)}# {OTHER} is a friend\n"
    properties = [
        {
            "property_id": entry.property_id,
            "value": text if entry.property_id == "constellation_config" else entry.value,
        }
        for entry in shipped.properties
    ]
    model = {
        "id": shipped.id,
        "name": shipped.name,
        "task": shipped.task.model_dump(),
        "tags": list(shipped.tags),
        "properties": properties,
    }
    schemas = {"input": shipped.input_schema, "output": shipped.output_schema}
    return parse_card(yaml.safe_dump({"model": model, "json_schema": schemas}))


async def get_card(serve: ServiceMaker, card: ModelCard, tmp_path: Path, account: str | None) -> model_pb2.ModelCard:
    """Return the card that an account's key gets; None sends no key, and "" an unknown one."""
    keys = {name: new_key(name) for name in (LISTED, OTHER, UNLISTED)}
    path = tmp_path / "keys.yaml"
    path.write_text("keys:\n" + "".join(f"  {line}\n" for _, line in keys.values()))
    key = new_key("unknown")[0] if account == "" else None if account is None else keys[account][0]
    metadata = () if key is None else (("authorization", f"Bearer {key}"),)
    async with serve(card=card, accounts=ApiKeyAuthenticator(path)) as service:
        response = await service.models.GetModelCard(model_pb2.GetModelCardRequest(), metadata=metadata)
    return response.model_card


@pytest.mark.parametrize(
    ("account", "limit"), [(LISTED, 6001), (OTHER, 6002), (UNLISTED, 5), (None, None), ("", None)], ids=str
)
async def test_each_account_sees_only_its_own_quota(
    serve_scripted: ServiceMaker, card: ModelCard, tmp_path: Path, account: str | None, limit: int | None
) -> None:
    """The card stays public, and neither a number nor an id of another account is in any of its bytes."""
    sent = await get_card(serve_scripted, card, tmp_path, account)
    assert sent.quota.max_requests_per_min == 5
    own = sent.quota.account_max_requests_per_min if sent.quota.HasField("account_max_requests_per_min") else None
    assert own == limit
    for name, secret in SECRET_LIMITS.items():
        assert name not in str(sent)
        assert str(secret) not in str(sent) or name == account


async def test_the_other_properties_are_unchanged(
    serve_scripted: ServiceMaker, card: ModelCard, tmp_path: Path
) -> None:
    """Only the accounts are missing from `constellation_config`; a card without accounts is sent unchanged."""
    sent = {
        entry.property_id: entry.value for entry in (await get_card(serve_scripted, card, tmp_path, None)).properties
    }
    written = {entry.property_id: entry.value for entry in card.properties}
    assert list(sent) == list(written)
    expected = yaml.safe_load(written["constellation_config"])
    del expected["max_requests_per_min"]["accounts"]
    assert yaml.safe_load(sent["constellation_config"]) == expected
    assert Decimal(str(expected["neurons"]["metrics"][0]["neuron_cost"])) == Decimal("0.3672")
    text = "max_requests_per_min: {default: 5} # plain"
    properties = tuple(
        entry.model_copy(update={"value": text}) if entry.property_id == "constellation_config" else entry
        for entry in card.properties
    )
    plain = card.model_copy(update={"properties": properties})
    sent_plain = (await get_card(serve_scripted, plain, tmp_path, None)).properties
    assert text in {entry.value for entry in sent_plain}


async def test_without_keys_the_quota_is_the_anonymous_accounts(
    serve_scripted: ServiceMaker, demo_card: ModelCard
) -> None:
    """Every caller is the account `anonymous`, for which the demo card has a quota."""
    async with serve_scripted(card=demo_card) as service:
        quota = (await service.models.GetModelCard(model_pb2.GetModelCardRequest())).model_card.quota
    assert (
        quota.account_max_requests_per_min == demo_card.constellation_config.max_requests_per_min.accounts["anonymous"]
    )


@pytest.mark.parametrize("kernels", ["", "amx"])
async def test_the_execution_is_shown(
    serve_scripted: ServiceMaker, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    """Device, precision, kind of step and family of kernels are those of the loaded model."""
    monkeypatch.setattr(ScriptedModel, "kernels", kernels)
    async with serve_scripted("A story.") as service:
        response = await service.models.GetModelCard(model_pb2.GetModelCardRequest())
    execution = response.execution
    assert (execution.device, execution.dtype) == ("cpu", "float32")
    assert (execution.step_kind, execution.kernels) == (model_pb2.STEP_KIND_TORCH, kernels)


def test_every_kind_of_step_has_a_value_in_the_contract() -> None:
    """A new kind cannot be forgotten: the names are equal, apart from the prefix and UNSPECIFIED."""
    kinds = {f"STEP_KIND_{kind.name}" for kind in StepKind}
    assert kinds | {"STEP_KIND_UNSPECIFIED"} == set(model_pb2.StepKind.keys())


async def test_the_fingerprint_appears_when_the_weights_are_hashed(serve_scripted: ServiceMaker) -> None:
    """A server serves without a fingerprint; later each reply and the card have it, with the inputs that it names."""
    fingerprint = Fingerprint({"kernels": "scripted"}, "quick")
    request = text_generation_pb2.GenerateRequest(prompt="a story")
    async with serve_scripted("A story.", fingerprint=fingerprint) as service:
        assert not (await service.text.Generate(request)).completion.HasField("fingerprint")
        execution = (await service.models.GetModelCard(model_pb2.GetModelCardRequest())).execution
        assert not execution.HasField("fingerprint")
        assert {item.name: item.value for item in execution.fingerprint_inputs} == {"kernels": "scripted"}
        fingerprint.set_weights("digest")
        reply = await service.text.Generate(request)
        parts = [part async for part in service.text.GenerateStream(request)]
        execution = (await service.models.GetModelCard(model_pb2.GetModelCardRequest())).execution
    expected = {fingerprint.value}
    assert {reply.completion.fingerprint, parts[-1].completion.fingerprint, execution.fingerprint} == expected
    assert {item.name: item.value for item in execution.fingerprint_inputs} == fingerprint.inputs
