"""Every refusal of the service, provoked over a real socket: its code, its details, and what the client makes of it."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from tests.support.processes import free_port
from tests.support.service import ServiceMaker, details, hold_slot, remaining_text, server_deadline, with_config

from llama2.v1 import account_pb2, account_pb2_grpc
from llama2.v1 import text_generation_pb2 as pb
from llama2_client import errors as client_errors
from llama2_server.admission.accounts import ApiKeyAuthenticator, new_key
from llama2_server.card import ModelCard, RequestsPerMinute
from llama2_server.errors import ServiceError

SECRET = "swordfish"  # noqa: S105
REQUEST = pb.GenerateRequest(prompt=f"Tell {SECRET} a story")
CODE = grpc.StatusCode


class Scene(NamedTuple):
    """What a refusal is provoked with."""

    serve: ServiceMaker
    card: ModelCard
    tmp_path: Path


Provocation = Callable[[Scene], Awaitable[grpc.aio.AioRpcError]]


class Refusal(NamedTuple):
    """One row of the table; `details` beside the ErrorInfo and the RequestInfo that are always there."""

    provoke: Provocation
    code: grpc.StatusCode
    reason: str
    details: set[str]
    exception: type[client_errors.Llama2Error]


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def broken_rule(scene: Scene) -> grpc.aio.AioRpcError:
    async with scene.serve() as service:
        return await refused(service.text.Generate(pb.GenerateRequest(prompt=SECRET, top_p=3, max_tokens=0)))


async def schema_violation(scene: Scene) -> grpc.aio.AioRpcError:
    async with scene.serve() as service:
        return await refused(service.text.Generate(pb.GenerateRequest(prompt=SECRET * 1000)))


async def prompt_too_long(scene: Scene) -> grpc.aio.AioRpcError:
    async with scene.serve() as service:
        return await refused(service.text.Generate(pb.GenerateRequest(prompt="é" * 2000, raw=True)))


async def very_many_violations(scene: Scene) -> grpc.aio.AioRpcError:
    messages = [pb.ChatMessage(content=f"[INST] {SECRET}") for _ in range(500)]
    async with scene.serve() as service:
        return await refused(service.text.Generate(pb.GenerateRequest(messages=messages)))


async def malformed_bytes(scene: Scene) -> grpc.aio.AioRpcError:
    async with scene.serve() as service:
        generate: Any = service.channel.unary_unary("/llama2.v1.TextGenerationService/Generate")
        return await refused(generate(b"\xff" + SECRET.encode()))


async def too_large(scene: Scene) -> grpc.aio.AioRpcError:
    async with scene.serve(max_message_bytes=1000) as service:
        return await refused(service.text.Generate(pb.GenerateRequest(prompt=SECRET * 1000)))


async def wrong_key(scene: Scene, metadata: tuple[tuple[str, str], ...]) -> grpc.aio.AioRpcError:
    keys = scene.tmp_path / "keys.yaml"
    keys.write_text("keys: {}\n")
    async with scene.serve(accounts=ApiKeyAuthenticator(keys)) as service:
        return await refused(service.text.Generate(REQUEST, metadata=metadata))


async def no_key(scene: Scene) -> grpc.aio.AioRpcError:
    return await wrong_key(scene, ())


async def unknown_key(scene: Scene) -> grpc.aio.AioRpcError:
    return await wrong_key(scene, (("authorization", f"Bearer l2_{SECRET}"),))


async def disabled_account(scene: Scene) -> grpc.aio.AioRpcError:
    key, line = new_key("42")
    keys = scene.tmp_path / "keys.yaml"
    keys.write_text(f"keys:\n  {line.replace('enabled: true', 'enabled: false')}\n")
    async with scene.serve(accounts=ApiKeyAuthenticator(keys)) as service:
        return await refused(service.text.Generate(REQUEST, metadata=(("authorization", f"Bearer {key}"),)))


async def quota_used_up(scene: Scene) -> grpc.aio.AioRpcError:
    card = with_config(scene.card, max_requests_per_min=RequestsPerMinute(default=1))
    async with scene.serve(card=card) as service:
        await service.text.Generate(REQUEST)
        return await refused(service.text.Generate(REQUEST))


async def line_full(scene: Scene) -> grpc.aio.AioRpcError:
    async with scene.serve(max_queue_size=0) as service:
        await hold_slot(service)
        return await refused(service.text.Generate(REQUEST))


async def wait_too_long(scene: Scene) -> grpc.aio.AioRpcError:
    async with scene.serve(queue_timeout_seconds=0.05) as service:
        await hold_slot(service)
        return await refused(service.text.Generate(REQUEST))


async def draining(scene: Scene) -> grpc.aio.AioRpcError:
    async with scene.serve() as service:
        await hold_slot(service)
        waiting = asyncio.create_task(refused(service.text.Generate(REQUEST)))
        await service.wait_until_queued(1)
    return await waiting


async def quota_store_down(scene: Scene) -> grpc.aio.AioRpcError:
    pytest.importorskip("redis", reason="NOT TESTED WITH REDIS: the redis extra is not installed")
    async with scene.serve(redis_url=f"redis://:{SECRET}@127.0.0.1:{free_port()}") as service:
        return await refused(service.text.Generate(REQUEST))


def on_a_store_that_is_down(scene: Scene) -> Any:
    pytest.importorskip("asyncpg", reason="NOT TESTED WITH POSTGRESQL: the postgresql extra is not installed")
    url = f"postgresql://user:{SECRET}@127.0.0.1:{free_port()}/usage"
    return scene.serve("Hi.", usage_url=url, usage_journal_max_bytes=64 * 1024)


async def ledger_full(scene: Scene) -> grpc.aio.AioRpcError:
    async with on_a_store_that_is_down(scene) as service:
        while True:
            try:
                await service.text.Generate(REQUEST)
            except grpc.aio.AioRpcError as error:
                return error


async def ledger_down(scene: Scene) -> grpc.aio.AioRpcError:
    async with on_a_store_that_is_down(scene) as service:
        stub: Any = account_pb2_grpc.AccountServiceStub(service.channel)
        return await refused(stub.GetUsage(account_pb2.GetUsageRequest()))


async def deadline_in_line(scene: Scene) -> grpc.aio.AioRpcError:
    async with scene.serve() as service:
        await hold_slot(service)
        while True:
            error = await refused(service.text.Generate(REQUEST, metadata=server_deadline(100)))
            # gRPC has a timer in the server too, and says nothing but the code when that is the first.
            if "grpc-status-details-bin" in dict(error.trailing_metadata()):
                return error


async def engine_fault(scene: Scene) -> grpc.aio.AioRpcError:
    async with scene.serve() as service:
        service.model.failure = RuntimeError(f"the model choked on {SECRET}")
        return await refused(service.text.Generate(REQUEST))


async def engine_hung(scene: Scene) -> grpc.aio.AioRpcError:
    async with scene.serve(engine_step_timeout_seconds=0.5) as service:
        held = await hold_slot(service)
        return await refused(remaining_text(held))


AGAIN = {"RetryInfo"}
REFUSALS = [
    Refusal(broken_rule, CODE.INVALID_ARGUMENT, "INVALID_REQUEST", {"BadRequest"}, client_errors.InvalidRequest),
    Refusal(schema_violation, CODE.INVALID_ARGUMENT, "INVALID_REQUEST", {"BadRequest"}, client_errors.InvalidRequest),
    Refusal(prompt_too_long, CODE.INVALID_ARGUMENT, "INVALID_REQUEST", {"BadRequest"}, client_errors.InvalidRequest),
    Refusal(
        very_many_violations, CODE.INVALID_ARGUMENT, "INVALID_REQUEST", {"BadRequest"}, client_errors.InvalidRequest
    ),
    Refusal(malformed_bytes, CODE.INVALID_ARGUMENT, "INVALID_REQUEST", {"BadRequest"}, client_errors.InvalidRequest),
    Refusal(too_large, CODE.INVALID_ARGUMENT, "REQUEST_TOO_LARGE", {"BadRequest"}, client_errors.InvalidRequest),
    Refusal(no_key, CODE.UNAUTHENTICATED, "UNAUTHENTICATED", set(), client_errors.Unauthenticated),
    Refusal(unknown_key, CODE.UNAUTHENTICATED, "UNAUTHENTICATED", set(), client_errors.Unauthenticated),
    Refusal(disabled_account, CODE.PERMISSION_DENIED, "ACCOUNT_DISABLED", set(), client_errors.PermissionDenied),
    Refusal(
        quota_used_up,
        CODE.RESOURCE_EXHAUSTED,
        "QUOTA_EXCEEDED",
        {"QuotaFailure", "RetryInfo"},
        client_errors.QuotaExceeded,
    ),
    Refusal(line_full, CODE.RESOURCE_EXHAUSTED, "QUEUE_FULL", AGAIN, client_errors.QueueFull),
    Refusal(wait_too_long, CODE.RESOURCE_EXHAUSTED, "QUEUE_WAIT_TOO_LONG", AGAIN, client_errors.QueueFull),
    Refusal(draining, CODE.UNAVAILABLE, "SHUTTING_DOWN", AGAIN, client_errors.Unavailable),
    Refusal(quota_store_down, CODE.UNAVAILABLE, "QUOTA_STORE_UNAVAILABLE", AGAIN, client_errors.Unavailable),
    Refusal(ledger_full, CODE.UNAVAILABLE, "USAGE_JOURNAL_FULL", AGAIN, client_errors.Unavailable),
    Refusal(ledger_down, CODE.UNAVAILABLE, "USAGE_UNAVAILABLE", AGAIN, client_errors.Unavailable),
    Refusal(deadline_in_line, CODE.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", set(), client_errors.DeadlineExceeded),
    Refusal(engine_hung, CODE.UNAVAILABLE, "ENGINE_UNAVAILABLE", AGAIN, client_errors.Unavailable),
    Refusal(engine_fault, CODE.INTERNAL, "INTERNAL", set(), client_errors.InternalError),
]


def test_every_refusal_of_the_service_is_in_the_table() -> None:
    """No class of the error tree goes untested."""

    def reasons(kind: type[ServiceError]) -> set[str]:
        own = {kind.reason} if "reason" in vars(kind) else set()
        return own.union(*map(reasons, kind.__subclasses__()))

    assert reasons(ServiceError) == {row.reason for row in REFUSALS}


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.provoke.__name__)
async def test_refusal(row: Refusal, serve_scripted: ServiceMaker, demo_card: ModelCard, tmp_path: Path) -> None:
    """The code, reason and details of the design's table, pushback with every RetryInfo, nothing of the caller's."""
    plain = with_config(demo_card, infer_response_cache=None, max_requests_per_min=RequestsPerMinute(default=10**6))
    error = await row.provoke(Scene(serve_scripted, plain, tmp_path))
    found = details(error)  # checks the ErrorInfo's domain, and that all trailers take less than 4 KB
    info, request_info = found["ErrorInfo"], found["RequestInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert isinstance(request_info, error_details_pb2.RequestInfo)
    assert (error.code(), info.reason) == (row.code, row.reason)
    assert set(found) == {"ErrorInfo", "RequestInfo"} | row.details
    assert SECRET not in str(error.details()) + str(found)

    exception = client_errors.from_rpc_error(error)
    assert type(exception) is row.exception
    assert (exception.code, exception.reason, exception.request_id) == (row.code, row.reason, request_info.request_id)
    assert bool(exception.violations) is ("BadRequest" in row.details)
    pushback = dict(error.trailing_metadata()).get("grpc-retry-pushback-ms")
    if "RetryInfo" in row.details:
        assert exception.retry_after == int(str(pushback)) / 1000 > 0
    else:
        assert (exception.retry_after, pushback) == (None, None)
