"""Budgets and quotas of the API keys file over a real socket."""

import asyncio
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from tests.integration.service.conftest import records
from tests.support.service import Service, ServiceMaker, details, hold_slot, remaining_text, until, with_config
from tests.unit.cli.runner import output

from llama2.hosted.v1 import hosted_endpoint_pb2, hosted_endpoint_pb2_grpc
from llama2.v1 import account_pb2, account_pb2_grpc, model_pb2
from llama2.v1 import text_generation_pb2 as pb
from llama2_client.errors import BudgetExhausted, from_rpc_error
from llama2_server.admission import accounts
from llama2_server.admission.accounts import ApiKeyAuthenticator
from llama2_server.card import ModelCard, RequestsPerMinute
from llama2_server.usage.pricing import TokenUsage, neurons

RACING = 64
MAX_TOKENS = 16


class Account:
    """The account 42 in a keys file, whose limits the command changes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        key = output("keys", "new", "42", "--api-keys-file", str(file)).strip()
        self.metadata = (("authorization", f"Bearer {key}"),)

    def limit(self, **limits: object) -> str:
        """Set limits with `llama2-server keys limit`, and return its output."""
        flags = [text for name, value in limits.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        return output("keys", "limit", "42", *flags, "--api-keys-file", str(self.file))

    async def usage(self, service: Service) -> account_pb2.GetUsageResponse:
        """Return the account's usage."""
        stub: Any = account_pb2_grpc.AccountServiceStub(service.channel)
        usage: account_pb2.GetUsageResponse = await stub.GetUsage(account_pb2.GetUsageRequest(), metadata=self.metadata)
        return usage

    async def generate(self, service: Service, prompt: str = "hello", **options: Any) -> pb.GenerateResponse:
        """Make a call that computes few tokens of the many that it may."""
        request = pb.GenerateRequest(prompt=prompt, raw=True, max_tokens=MAX_TOKENS, **options)
        return await service.text.Generate(request, metadata=self.metadata)


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Account:
    """An account in a keys file that the server reads again soon."""
    monkeypatch.setattr(accounts, "RELOAD_SECONDS", 0.01)
    return Account(tmp_path / "keys.yaml")


@pytest.fixture
def card(demo_card: ModelCard) -> ModelCard:
    """The demo card with its response cache, and a quota that allows all calls."""
    return with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=10**6))


async def until_budget(authenticator: ApiKeyAuthenticator, budget: Decimal | None) -> None:
    """Wait until the server has read this budget."""
    await until(lambda: authenticator.limits("42").neurons_per_month == budget)


async def highest_price(service: Service, card: ModelCard, account: Account) -> Decimal:
    """Return the price that a call reserves."""
    count = await service.text.CountTokens(pb.CountTokensRequest(prompt="hello", raw=True), metadata=account.metadata)
    return neurons(TokenUsage(count.input_tokens, MAX_TOKENS), card.neuron_costs)


async def test_racing_calls_stay_within_the_budget(
    serve_scripted: ServiceMaker, card: ModelCard, account: Account, tmp_path: Path
) -> None:
    """Of 64 calls at once only those that fit are served; the others cost no quota and leave no record."""
    authenticator = ApiKeyAuthenticator(account.file)
    async with serve_scripted("Hi.", card=card, accounts=authenticator, max_queue_size=RACING) as service:
        price = await highest_price(service, card, account)
        budget = (3 * price + Decimal("0.1")).normalize()
        account.limit(neurons_per_month=budget)
        await until_budget(authenticator, budget)
        held = await hold_slot(service, "hello", metadata=account.metadata, raw=True, max_tokens=MAX_TOKENS)
        calls = [asyncio.create_task(account.generate(service, no_cache=True)) for _ in range(RACING)]
        await until(lambda: sum(call.done() for call in calls) == RACING - 2)
        state = (await account.usage(service)).budget
        assert (state.neurons_per_month, state.neurons_spent) == (str(budget), "0")
        assert Decimal(state.neurons_reserved) == 3 * price
        service.model.open_gate()
        await remaining_text(held)
        results = await asyncio.gather(*calls, return_exceptions=True)
        served = [result for result in results if isinstance(result, pb.GenerateResponse)]
        usage = await account.usage(service)
        assert len(served) == 2
        assert usage.budget.neurons_reserved == "0"
        assert Decimal(usage.budget.neurons_spent) == 3 * Decimal(served[0].completion.usage.neurons)
        assert usage.quota.max_requests_per_min - usage.quota.requests_left == 3
        assert service.metrics.registry.get_sample_value("llama2_budget_rejections_total") == RACING - 2
    assert len(list(records(tmp_path))) == 3


async def test_error_of_an_exhausted_budget(serve_scripted: ServiceMaker, card: ModelCard, account: Account) -> None:
    """The error names the amounts and the start of the next month, forbids automatic retries, and has its own class."""
    account.limit(neurons_per_month=1)
    async with serve_scripted(card=card, accounts=ApiKeyAuthenticator(account.file)) as service:
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await account.generate(service)
        now = datetime.now(UTC)
        error, found = rejected.value, details(rejected.value)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert found["ErrorInfo"].reason == "BUDGET_EXHAUSTED"  # type: ignore[attr-defined]
        [violation] = found["QuotaFailure"].violations  # type: ignore[attr-defined]
        assert (violation.subject, violation.description) == ("account:42", error.details())
        retry = found["RetryInfo"]
        assert isinstance(retry, error_details_pb2.RetryInfo)
        next_month = (now.replace(day=1) + timedelta(days=31)).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        assert abs(retry.retry_delay.ToTimedelta() - (next_month - now)) < timedelta(seconds=60)
        assert dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"] == "-1"
        assert isinstance(from_rpc_error(error), BudgetExhausted)
        assert service.model.prefills == 0  # the engine computed nothing for it
        hosted: Any = hosted_endpoint_pb2_grpc.HostedEndpointServiceStub(service.channel)
        request = hosted_endpoint_pb2.RunRequest(account_id="42", model=card.name)
        request.body.data = b'{"prompt": "hello", "raw": true}'
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await hosted.Run(request, metadata=account.metadata)
        trailers = dict(rejected.value.trailing_metadata() or ())
        assert trailers["llama2-http-status"] == "429"
        assert '"code": 3036' in str(trailers["llama2-http-body"])


async def test_cached_and_shared_replies_need_no_budget(
    serve_scripted: ServiceMaker, card: ModelCard, account: Account
) -> None:
    """They cost nothing, so an exhausted budget does not reject them."""
    authenticator = ApiKeyAuthenticator(account.file)
    async with serve_scripted("Hi.", card=card, accounts=authenticator) as service:
        price = await highest_price(service, card, account)
        account.limit(neurons_per_month=price)
        await until_budget(authenticator, price)
        held = await hold_slot(service, "hello", metadata=account.metadata, raw=True, max_tokens=MAX_TOKENS)
        shared = asyncio.create_task(account.generate(service))
        with pytest.raises(grpc.aio.AioRpcError):
            await account.generate(service, "other")
        service.model.open_gate()
        await remaining_text(held)
        assert (await shared).completion.cached
        assert (await account.generate(service)).completion.cached
        with pytest.raises(grpc.aio.AioRpcError):
            await account.generate(service, no_cache=True)


async def test_limits_apply_while_the_server_runs(
    serve_scripted: ServiceMaker, card: ModelCard, account: Account
) -> None:
    """The command sets and removes an account's quota and budget; the account sees its own, and no one else does."""
    authenticator = ApiKeyAuthenticator(account.file)
    async with serve_scripted("Hi.", card=card, accounts=authenticator) as service:
        for requests, budget in ((2, "12.5"), ("card", "none")):
            account.limit(requests_per_minute=requests, neurons_per_month=budget)
            expected = None if budget == "none" else Decimal(budget)
            await until_budget(authenticator, expected)
            allowed = 10**6 if requests == "card" else requests
            usage = await account.usage(service)
            assert usage.quota.max_requests_per_min == allowed
            assert usage.budget.neurons_per_month == ("" if expected is None else budget)
            assert usage.HasField("budget") == (expected is not None)
            own, public = [
                (await service.models.GetModelCard(model_pb2.GetModelCardRequest(), metadata=metadata)).model_card.quota
                for metadata in (account.metadata, ())
            ]
            assert (own.account_max_requests_per_min, own.HasField("account_neurons_per_month")) == (
                allowed,
                expected is not None,
            )
            assert not public.HasField("account_neurons_per_month")
