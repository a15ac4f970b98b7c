"""The limits of calls that generate nothing, and the thread of costly validation, over a real socket."""

import threading
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from tests.support.service import Service, ServiceMaker, details, health_stub

from llama2.v1 import account_pb2, account_pb2_grpc, model_pb2
from llama2.v1 import text_generation_pb2 as pb
from llama2_server.admission.accounts import ApiKeyAuthenticator
from llama2_server.admission.keys.keys_file import new_key
from llama2_server.api.validation.request_validator import RequestTokens, RequestValidator

Metadata = tuple[tuple[str, str], ...]
VALID = pb.GenerateRequest(prompt="Hi", max_tokens=1)
INVALID = pb.GenerateRequest(prompt="Hi", top_p=2)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[ApiKeyAuthenticator, Metadata, Metadata]:
    """Return an authenticator, and the metadata of two accounts."""
    (first, first_entry), (second, second_entry) = new_key("42"), new_key("43")
    file = tmp_path / "keys.yaml"
    file.write_text(f"keys:\n  {first_entry}\n  {second_entry}\n")
    return (
        ApiKeyAuthenticator(file),
        (("authorization", f"Bearer {first}"),),
        (("authorization", f"Bearer {second}"),),
    )


async def reason(call: Any) -> str:
    """Return the reason of a failed call; TOO_MANY_REQUESTS has a retry time of at most a minute."""
    with pytest.raises(grpc.aio.AioRpcError) as rejected:
        await call
    found = details(rejected.value)
    info = found["ErrorInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    if info.reason == "TOO_MANY_REQUESTS":
        assert rejected.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert 0 < found["RetryInfo"].retry_delay.ToMilliseconds() <= 60_000  # type: ignore[attr-defined]
    return str(info.reason)


def usage(service: Service, metadata: Metadata) -> Any:
    """Return a call of GetUsage."""
    stub: Any = account_pb2_grpc.AccountServiceStub(service.channel)
    return stub.GetUsage(account_pb2.GetUsageRequest(), metadata=metadata)


def card(service: Service, metadata: Metadata = ()) -> Any:
    """Return a call of GetModelCard."""
    return service.models.GetModelCard(model_pb2.GetModelCardRequest(), metadata=metadata)


async def test_invalid_requests_use_up_the_budget(
    serve_scripted: ServiceMaker, keys: tuple[ApiKeyAuthenticator, Metadata, Metadata]
) -> None:
    """After 3 invalid requests, also malformed ones, the account's calls are rejected; another account's are not."""
    authenticator, first, second = keys
    async with serve_scripted(accounts=authenticator, max_free_calls_per_minute=3) as service:
        malformed: Any = service.channel.unary_unary("/llama2.v1.TextGenerationService/Generate")
        assert await reason(malformed(b"\xff\xff", metadata=first)) == "INVALID_REQUEST"
        for _ in range(2):
            assert await reason(service.text.Generate(INVALID, metadata=first)) == "INVALID_REQUEST"
        for request in (INVALID, VALID):
            assert await reason(service.text.Generate(request, metadata=first)) == "TOO_MANY_REQUESTS"
        assert await reason(card(service, first)) == "TOO_MANY_REQUESTS"
        await service.text.Generate(VALID, metadata=second)


async def test_calls_that_generate_nothing_use_up_the_budget(
    serve_scripted: ServiceMaker, keys: tuple[ApiKeyAuthenticator, Metadata, Metadata]
) -> None:
    """CountTokens, GetUsage and GetModelCard take one token each, also if they are invalid; Generate takes none."""
    authenticator, first, _ = keys
    async with serve_scripted(accounts=authenticator, max_free_calls_per_minute=4) as service:
        for _ in range(6):
            await service.text.Generate(VALID, metadata=first)
        await service.text.CountTokens(pb.CountTokensRequest(prompt="Hi"), metadata=first)
        assert await reason(service.text.CountTokens(pb.CountTokensRequest(), metadata=first)) == "INVALID_REQUEST"
        await usage(service, first)
        await card(service, first)
        assert await reason(usage(service, first)) == "TOO_MANY_REQUESTS"


async def test_calls_without_a_key_never_limit_calls_with_one(
    serve_scripted: ServiceMaker, keys: tuple[ApiKeyAuthenticator, Metadata, Metadata]
) -> None:
    """Wrong keys, missing keys and GetModelCard without a key share a limit; valid keys and health are not limited."""
    authenticator, first, _ = keys
    wrong = (("authorization", "Bearer l2_0123456789ab_" + "x" * 43),)
    async with serve_scripted(accounts=authenticator, max_keyless_calls_per_minute=3) as service:
        assert await reason(service.text.Generate(VALID, metadata=wrong)) == "UNAUTHENTICATED"
        assert await reason(service.text.Generate(VALID)) == "UNAUTHENTICATED"
        await card(service)
        assert await reason(card(service)) == "TOO_MANY_REQUESTS"
        assert await reason(service.text.Generate(VALID, metadata=wrong)) == "TOO_MANY_REQUESTS"
        await service.text.Generate(VALID, metadata=first)
        await card(service, first)
        await health_stub(service.channel).Check(health_pb2.HealthCheckRequest())


async def test_long_conversations_are_validated_in_another_thread(
    serve_scripted: ServiceMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short request is validated on the event loop, and a long one in the thread `validation`."""
    threads: list[str] = []
    validate = RequestValidator.validate_count_tokens

    def recorded(validator: RequestValidator, request: pb.CountTokensRequest) -> RequestTokens:
        threads.append(threading.current_thread().name)
        return validate(validator, request)

    monkeypatch.setattr(RequestValidator, "validate_count_tokens", recorded)
    turns = [pb.ChatMessage(role="user", content="a"), pb.ChatMessage(role="assistant", content="b")] * 30
    long = pb.CountTokensRequest(messages=[*turns, pb.ChatMessage(role="user", content="c")])
    async with serve_scripted() as service:
        await service.text.CountTokens(pb.CountTokensRequest(prompt="Hi"))
        assert (await service.text.CountTokens(long)).input_tokens > 60
        assert await reason(service.text.CountTokens(pb.CountTokensRequest(messages=turns))) == "INVALID_REQUEST"
    assert threads == [threading.main_thread().name, "validation_0", "validation_0"]
