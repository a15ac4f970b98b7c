"""Every error of the service, provoked over a real socket: its code, its details, and the client's exception."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from tests.support.deadlines import DEADLINE_SECONDS, LoopClock, server_deadline
from tests.support.processes import free_port
from tests.support.scripted_model import scripted_fingerprint
from tests.support.service import ServiceMaker, details, hold_slot, remaining_text, with_config

from llama2.hosted.v1 import hosted_endpoint_pb2, hosted_endpoint_pb2_grpc
from llama2.v1 import account_pb2, account_pb2_grpc
from llama2.v1 import text_generation_pb2 as pb
from llama2_client import errors as client_errors
from llama2_server.admission.accounts import ApiKeyAuthenticator
from llama2_server.admission.keys.keys_file import new_key
from llama2_server.card import ModelCard, RequestsPerMinute
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.errors import MAX_PUSHBACK_SECONDS, ServiceError

SECRET = "swordfish"  # noqa: S105
REQUEST = pb.GenerateRequest(prompt=f"Tell {SECRET} a story")
RESUMED = pb.GenerateRequest(prompt="Hi", idempotency_key=SECRET, resume_after_characters=1)
CODE = grpc.StatusCode


class Setup(NamedTuple):
    """Fixtures for a provocation."""

    serve: ServiceMaker
    card: ModelCard
    tmp_path: Path
    clock: LoopClock


Provocation = Callable[[Setup], Awaitable[grpc.aio.AioRpcError]]


class Case(NamedTuple):
    """An error of the service; `details` without ErrorInfo and RequestInfo, which every error has."""

    provoke: Provocation
    code: grpc.StatusCode
    reason: str
    details: set[str]
    exception: type[client_errors.Llama2Error]


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    """Await a call, and return its error."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def violated_rule(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve() as service:
        return await error_of(service.text.Generate(pb.GenerateRequest(prompt=SECRET, top_p=3, max_tokens=0)))


async def schema_violation(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve() as service:
        return await error_of(service.text.Generate(pb.GenerateRequest(prompt=SECRET * 1000)))


async def prompt_too_long(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve() as service:
        return await error_of(service.text.Generate(pb.GenerateRequest(prompt="é" * 2000, raw=True)))


async def unknown_model(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve() as service:
        hosted: Any = hosted_endpoint_pb2_grpc.HostedEndpointServiceStub(service.channel)
        return await error_of(hosted.Run(hosted_endpoint_pb2.RunRequest(account_id="1", model=SECRET)))


async def many_violations(setup: Setup) -> grpc.aio.AioRpcError:
    messages = [pb.ChatMessage(content=f"[INST] {SECRET}") for _ in range(100)]
    async with setup.serve() as service:
        return await error_of(service.text.Generate(pb.GenerateRequest(messages=messages)))


async def malformed_bytes(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve() as service:
        generate: Any = service.channel.unary_unary("/llama2.v1.TextGenerationService/Generate")
        return await error_of(generate(b"\xff" + SECRET.encode()))


async def too_large(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve(max_message_bytes=1000) as service:
        return await error_of(service.text.Generate(pb.GenerateRequest(prompt=SECRET * 1000)))


async def wrong_key(setup: Setup, metadata: tuple[tuple[str, str], ...]) -> grpc.aio.AioRpcError:
    keys = setup.tmp_path / "keys.yaml"
    keys.write_text("keys: {}\n")
    async with setup.serve(accounts=ApiKeyAuthenticator(keys)) as service:
        return await error_of(service.text.Generate(REQUEST, metadata=metadata))


async def no_key(setup: Setup) -> grpc.aio.AioRpcError:
    return await wrong_key(setup, ())


async def unknown_key(setup: Setup) -> grpc.aio.AioRpcError:
    return await wrong_key(setup, (("authorization", f"Bearer l2_{SECRET}"),))


async def disabled_account(setup: Setup) -> grpc.aio.AioRpcError:
    key, line = new_key("42")
    keys = setup.tmp_path / "keys.yaml"
    keys.write_text(f"keys:\n  {line.replace('enabled: true', 'enabled: false')}\n")
    async with setup.serve(accounts=ApiKeyAuthenticator(keys)) as service:
        return await error_of(service.text.Generate(REQUEST, metadata=(("authorization", f"Bearer {key}"),)))


async def quota_used_up(setup: Setup) -> grpc.aio.AioRpcError:
    card = with_config(setup.card, max_requests_per_min=RequestsPerMinute(default=1))
    async with setup.serve(card=card) as service:
        await service.text.Generate(REQUEST)
        return await error_of(service.text.Generate(REQUEST))


async def budget_exhausted(setup: Setup) -> grpc.aio.AioRpcError:
    key, line = new_key("42")
    keys = setup.tmp_path / "keys.yaml"
    keys.write_text(f"keys:\n  {line}\naccounts:\n  '42': {{neurons_per_month: 0}}\n")
    async with setup.serve(accounts=ApiKeyAuthenticator(keys)) as service:
        return await error_of(service.text.Generate(REQUEST, metadata=(("authorization", f"Bearer {key}"),)))


async def queue_full(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve(max_queue_size=0) as service:
        await hold_slot(service)
        return await error_of(service.text.Generate(REQUEST))


async def queue_wait_too_long(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve(queue_timeout_seconds=60) as service:
        await hold_slot(service)
        queued = asyncio.create_task(error_of(service.text.Generate(REQUEST)))
        await service.wait_until_queued(1)
        setup.clock.advance(60)
        return await queued


async def key_reused(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve("Hi.") as service:
        await service.text.Generate(pb.GenerateRequest(prompt="Hi", idempotency_key=SECRET))
        return await error_of(service.text.Generate(pb.GenerateRequest(prompt=SECRET, idempotency_key=SECRET)))


async def key_unknown(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve() as service:
        return await error_of(service.text.GenerateStream(RESUMED).read())


async def fingerprint_changed(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve("Hi.") as service:
        await service.text.Generate(pb.GenerateRequest(prompt="Hi", idempotency_key=SECRET))
    async with setup.serve(fingerprint=scripted_fingerprint("other")) as service:
        return await error_of(service.text.GenerateStream(RESUMED).read())


async def fingerprint_pending(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve("Hi.") as service:
        await service.text.Generate(pb.GenerateRequest(prompt="Hi", idempotency_key=SECRET))
    fingerprint = Fingerprint({"kernels": "scripted"}, "scripted")
    fingerprint.is_pending = True
    async with setup.serve(fingerprint=fingerprint) as service:
        return await error_of(service.text.GenerateStream(RESUMED).read())


async def too_many_requests(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve(max_free_calls_per_minute=1) as service:
        await service.text.CountTokens(pb.CountTokensRequest(prompt="Hi"))
        return await error_of(service.text.CountTokens(pb.CountTokensRequest(prompt="Hi")))


async def shutting_down(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve() as service:
        await hold_slot(service)
        queued = asyncio.create_task(error_of(service.text.Generate(REQUEST)))
        await service.wait_until_queued(1)
    return await queued


async def quota_store_unavailable(setup: Setup) -> grpc.aio.AioRpcError:
    pytest.importorskip("redis", reason="NOT TESTED WITH REDIS: the redis extra is not installed")
    async with setup.serve(redis_url=f"redis://:{SECRET}@127.0.0.1:{free_port()}") as service:
        return await error_of(service.text.Generate(REQUEST))


def serve_without_store(setup: Setup) -> Any:
    pytest.importorskip("asyncpg", reason="NOT TESTED WITH POSTGRESQL: the postgresql extra is not installed")
    url = f"postgresql://user:{SECRET}@127.0.0.1:{free_port()}/usage"
    return setup.serve("Hi.", usage_url=url, usage_max_pending_records=2)


async def usage_not_recorded(setup: Setup) -> grpc.aio.AioRpcError:
    async with serve_without_store(setup) as service:
        while True:
            try:
                await service.text.Generate(REQUEST)
            except grpc.aio.AioRpcError as error:
                return error


async def usage_unavailable(setup: Setup) -> grpc.aio.AioRpcError:
    async with serve_without_store(setup) as service:
        stub: Any = account_pb2_grpc.AccountServiceStub(service.channel)
        return await error_of(stub.GetUsage(account_pb2.GetUsageRequest()))


async def deadline_exceeded(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve() as service:
        await hold_slot(service)
        queued = asyncio.create_task(error_of(service.text.Generate(REQUEST, metadata=server_deadline())))
        await service.wait_until_queued(1)
        # The queue's timer expires, not gRPC's, which sends no details.
        setup.clock.advance(DEADLINE_SECONDS)
        return await queued


async def engine_error(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve() as service:
        service.model.failure = RuntimeError(f"the model failed at {SECRET}")
        return await error_of(service.text.Generate(REQUEST))


async def engine_hung(setup: Setup) -> grpc.aio.AioRpcError:
    async with setup.serve(engine_step_timeout_seconds=60) as service:
        held = await hold_slot(service)
        setup.clock.advance(60)
        return await error_of(remaining_text(held))


RETRY = {"RetryInfo"}
CASES = [
    Case(violated_rule, CODE.INVALID_ARGUMENT, "INVALID_REQUEST", {"BadRequest"}, client_errors.InvalidRequest),
    Case(schema_violation, CODE.INVALID_ARGUMENT, "INVALID_REQUEST", {"BadRequest"}, client_errors.InvalidRequest),
    Case(prompt_too_long, CODE.INVALID_ARGUMENT, "INVALID_REQUEST", {"BadRequest"}, client_errors.InvalidRequest),
    Case(many_violations, CODE.INVALID_ARGUMENT, "INVALID_REQUEST", {"BadRequest"}, client_errors.InvalidRequest),
    Case(malformed_bytes, CODE.INVALID_ARGUMENT, "INVALID_REQUEST", {"BadRequest"}, client_errors.InvalidRequest),
    Case(too_large, CODE.INVALID_ARGUMENT, "REQUEST_TOO_LARGE", {"BadRequest"}, client_errors.InvalidRequest),
    Case(unknown_model, CODE.INVALID_ARGUMENT, "UNKNOWN_MODEL", {"BadRequest"}, client_errors.InvalidRequest),
    Case(no_key, CODE.UNAUTHENTICATED, "UNAUTHENTICATED", set(), client_errors.Unauthenticated),
    Case(unknown_key, CODE.UNAUTHENTICATED, "UNAUTHENTICATED", set(), client_errors.Unauthenticated),
    Case(disabled_account, CODE.PERMISSION_DENIED, "ACCOUNT_DISABLED", set(), client_errors.PermissionDenied),
    Case(
        quota_used_up,
        CODE.RESOURCE_EXHAUSTED,
        "QUOTA_EXCEEDED",
        {"QuotaFailure", "RetryInfo"},
        client_errors.QuotaExceeded,
    ),
    Case(
        budget_exhausted,
        CODE.RESOURCE_EXHAUSTED,
        "BUDGET_EXHAUSTED",
        {"QuotaFailure", "RetryInfo"},
        client_errors.BudgetExhausted,
    ),
    Case(key_reused, CODE.INVALID_ARGUMENT, "IDEMPOTENCY_KEY_REUSED", {"BadRequest"}, client_errors.InvalidRequest),
    Case(key_unknown, CODE.FAILED_PRECONDITION, "IDEMPOTENCY_KEY_UNKNOWN", set(), client_errors.FailedPrecondition),
    Case(
        fingerprint_changed,
        CODE.FAILED_PRECONDITION,
        "FINGERPRINT_CHANGED",
        set(),
        client_errors.FailedPrecondition,
    ),
    Case(fingerprint_pending, CODE.UNAVAILABLE, "FINGERPRINT_PENDING", RETRY, client_errors.Unavailable),
    Case(queue_full, CODE.RESOURCE_EXHAUSTED, "QUEUE_FULL", RETRY, client_errors.QueueFull),
    Case(queue_wait_too_long, CODE.RESOURCE_EXHAUSTED, "QUEUE_WAIT_TOO_LONG", RETRY, client_errors.QueueFull),
    Case(too_many_requests, CODE.RESOURCE_EXHAUSTED, "TOO_MANY_REQUESTS", RETRY, client_errors.TooManyRequests),
    Case(shutting_down, CODE.UNAVAILABLE, "SHUTTING_DOWN", RETRY, client_errors.Unavailable),
    Case(quota_store_unavailable, CODE.UNAVAILABLE, "QUOTA_STORE_UNAVAILABLE", RETRY, client_errors.Unavailable),
    Case(usage_not_recorded, CODE.UNAVAILABLE, "USAGE_UNAVAILABLE", RETRY, client_errors.Unavailable),
    Case(usage_unavailable, CODE.UNAVAILABLE, "USAGE_UNAVAILABLE", RETRY, client_errors.Unavailable),
    Case(deadline_exceeded, CODE.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", set(), client_errors.DeadlineExceeded),
    Case(engine_hung, CODE.UNAVAILABLE, "ENGINE_UNAVAILABLE", RETRY, client_errors.Unavailable),
    Case(engine_error, CODE.INTERNAL, "INTERNAL", set(), client_errors.InternalError),
]


def test_every_error_of_the_service_has_a_case() -> None:
    """The reasons of all error classes are tested."""

    def reasons(kind: type[ServiceError]) -> set[str]:
        own = {kind.reason} if "reason" in vars(kind) else set()
        return own.union(*map(reasons, kind.__subclasses__()))

    assert reasons(ServiceError) == {case.reason for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.provoke.__name__)
async def test_error(
    case: Case, serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path, clock: LoopClock
) -> None:
    """The error has its code, reason and details, a pushback with each RetryInfo, and nothing from the request."""
    plain_card = with_config(
        demo_card, infer_response_cache=None, max_requests_per_min=RequestsPerMinute(default=10**6)
    )
    error = await case.provoke(Setup(serve_scripted, plain_card, tmp_path, clock))
    found = details(error)  # also checks the domain of the ErrorInfo and the size of the trailers
    info, request_info = found["ErrorInfo"], found["RequestInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert isinstance(request_info, error_details_pb2.RequestInfo)
    assert (error.code(), info.reason) == (case.code, case.reason)
    assert set(found) == {"ErrorInfo", "RequestInfo"} | case.details
    assert SECRET not in str(error.details()) + str(found)

    exception = client_errors.from_rpc_error(error)
    assert type(exception) is case.exception
    assert (exception.code, exception.reason, exception.request_id) == (case.code, case.reason, request_info.request_id)
    assert bool(exception.violations) is ("BadRequest" in case.details)
    pushback = dict(error.trailing_metadata()).get("grpc-retry-pushback-ms")
    if "RetryInfo" in case.details:
        assert exception.retry_after is not None
        assert exception.retry_after > 0
        waits = round(exception.retry_after * 1000)
        assert int(str(pushback)) == (waits if waits <= MAX_PUSHBACK_SECONDS * 1000 else -1)
    else:
        assert (exception.retry_after, pushback) == (None, None)
