"""The exception for every status, with the details of the status."""

from __future__ import annotations

import socket

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from tests.support.scripted_server import ScriptedServer

import llama2_client
from llama2_client import Client, Llama2Error, Violation, errors

RETRY_IN_11_SECONDS = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=11, nanos=500_000_000))
QUOTA = error_details_pb2.QuotaFailure(
    violations=[error_details_pb2.QuotaFailure.Violation(subject="account:demo", description="5 requests per minute")]
)


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, [], errors.InvalidRequest),
        (grpc.StatusCode.UNAUTHENTICATED, [], errors.Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, [], errors.PermissionDenied),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, [QUOTA, RETRY_IN_11_SECONDS], errors.QuotaExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, [RETRY_IN_11_SECONDS], errors.QueueFull),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, [], errors.ResourceExhausted),
        (grpc.StatusCode.UNAVAILABLE, [RETRY_IN_11_SECONDS], errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, [], errors.DeadlineExceeded),
        (grpc.StatusCode.INTERNAL, [], errors.InternalError),
        (grpc.StatusCode.UNIMPLEMENTED, [], errors.Unimplemented),
        (grpc.StatusCode.UNKNOWN, [], errors.Llama2Error),
        (grpc.StatusCode.CANCELLED, [], errors.Llama2Error),
        (grpc.StatusCode.NOT_FOUND, [], errors.Llama2Error),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_each_status_has_its_own_exception(
    client: Client,
    server: ScriptedServer,
    code: grpc.StatusCode,
    details: list[Message],
    kind: type[Llama2Error],
    streamed: bool,
) -> None:
    """Each status raises its exception with code and message, for whole replies and for streams."""
    server.script_error(code, "the reason", *details, pushback_ms=-1)
    send = client.chat().send if streamed else client.generate
    with pytest.raises(Llama2Error) as caught:
        await send("Hi")
    assert type(caught.value) is kind
    assert caught.value.code is code
    assert caught.value.message == str(caught.value) == "the reason"
    assert caught.value.retry_after == (11.5 if RETRY_IN_11_SECONDS in details else None)


async def test_every_detail_is_decoded(client: Client, server: ScriptedServer) -> None:
    """The exception has the reason, the time to retry, the request id and every violation of the details."""
    field_violation = error_details_pb2.BadRequest.FieldViolation
    server.script_error(
        grpc.StatusCode.INVALID_ARGUMENT,
        "2 violations",
        error_details_pb2.DebugInfo(detail="a type of detail that this client does not know"),
        error_details_pb2.ErrorInfo(reason="SCHEMA_VIOLATION", domain="llama2.v1"),
        error_details_pb2.RequestInfo(request_id="6d1a"),
        error_details_pb2.BadRequest(
            field_violations=[
                field_violation(field="messages[1].content", description="longer than 4096 characters"),
                field_violation(field="top_p", description="must be in (0, 1], got 1.5"),
            ]
        ),
    )
    with pytest.raises(errors.InvalidRequest) as caught:
        await client.count_tokens("Hi")
    error = caught.value
    assert (error.reason, error.request_id, error.retry_after) == ("SCHEMA_VIOLATION", "6d1a", None)
    assert error.violations == (
        Violation("messages[1].content", "longer than 4096 characters"),
        Violation("top_p", "must be in (0, 1], got 1.5"),
    )


async def test_malformed_details_are_ignored(client: Client, server: ScriptedServer) -> None:
    """If the details are not a google.rpc.Status, the exception still has the code and message."""
    server.script_error(grpc.StatusCode.INTERNAL, "the engine failed", raw_details=b"\xff\xff\xff")
    with pytest.raises(errors.InternalError, match="the engine failed") as caught:
        await client.generate("Hi")
    assert caught.value.reason is None


async def test_a_malformed_detail_is_ignored(client: Client, server: ScriptedServer) -> None:
    """One malformed detail does not hide the others."""
    malformed = b"\x1a\x2e\n\x28type.googleapis.com/google.rpc.RetryInfo\x12\x02\xff\xff"
    server.script_error(grpc.StatusCode.INTERNAL, "the engine failed", raw_details=malformed)
    with pytest.raises(errors.InternalError, match="the engine failed") as caught:
        await client.generate("Hi")
    assert caught.value.retry_after is None


async def test_a_refused_connection_is_unavailable() -> None:
    """A refused TCP connection raises Unavailable, without a reason or details."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with Client(f"127.0.0.1:{unused.getsockname()[1]}", timeout=10) as client:
            with pytest.raises(errors.Unavailable) as caught:
                await client.model_card()
    assert caught.value.reason is None
    assert caught.value.violations == ()


def test_the_package_exports_the_names_in_all() -> None:
    """The package has every name in `__all__` and raises AttributeError for other names."""
    for name in llama2_client.__all__:
        assert getattr(llama2_client, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = llama2_client.Nothing
