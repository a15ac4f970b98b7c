"""Every status and its details, as the exception that the caller sees."""

from __future__ import annotations

import socket

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from tests.support.scripted_server import ScriptedServer

import llama2_client
from llama2_client import Client, Llama2Error, Violation
from llama2_client import errors as tree

RETRY_IN_11_SECONDS = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=11, nanos=500_000_000))
QUOTA = error_details_pb2.QuotaFailure(
    violations=[error_details_pb2.QuotaFailure.Violation(subject="account:demo", description="5 requests a minute")]
)


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, [], tree.InvalidRequest),
        (grpc.StatusCode.UNAUTHENTICATED, [], tree.Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, [], tree.PermissionDenied),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, [QUOTA, RETRY_IN_11_SECONDS], tree.QuotaExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, [RETRY_IN_11_SECONDS], tree.QueueFull),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, [], tree.ResourceExhausted),
        (grpc.StatusCode.UNAVAILABLE, [RETRY_IN_11_SECONDS], tree.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, [], tree.DeadlineExceeded),
        (grpc.StatusCode.INTERNAL, [], tree.InternalError),
        (grpc.StatusCode.UNIMPLEMENTED, [], tree.Unimplemented),
        (grpc.StatusCode.UNKNOWN, [], tree.Llama2Error),
        (grpc.StatusCode.CANCELLED, [], tree.Llama2Error),
        (grpc.StatusCode.NOT_FOUND, [], tree.Llama2Error),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_each_status_is_its_own_exception(
    client: Client,
    server: ScriptedServer,
    code: grpc.StatusCode,
    details: list[Message],
    kind: type[Llama2Error],
    streamed: bool,
) -> None:
    """Each status raises its class, with its code and message, whether the reply is whole or streamed."""
    server.refuses(code, "in plain words", *details, pushback_ms=-1)
    ask = client.chat().say if streamed else client.generate
    with pytest.raises(Llama2Error) as caught:
        await ask("Hi")
    assert type(caught.value) is kind
    assert caught.value.code is code
    assert caught.value.message == str(caught.value) == "in plain words"
    assert caught.value.retry_after == (11.5 if RETRY_IN_11_SECONDS in details else None)


async def test_every_detail_is_decoded(client: Client, server: ScriptedServer) -> None:
    """The reason, the wait, the request's id and every violation are read from the details."""
    field_violation = error_details_pb2.BadRequest.FieldViolation
    server.refuses(
        grpc.StatusCode.INVALID_ARGUMENT,
        "2 violations",
        error_details_pb2.DebugInfo(detail="a kind of detail that this client does not know"),
        error_details_pb2.ErrorInfo(reason="SCHEMA_VIOLATION", domain="llama2.v1"),
        error_details_pb2.RequestInfo(request_id="6d1a"),
        error_details_pb2.BadRequest(
            field_violations=[
                field_violation(field="messages[1].content", description="longer than 4096 characters"),
                field_violation(field="top_p", description="must be in (0, 1], got 1.5"),
            ]
        ),
    )
    with pytest.raises(tree.InvalidRequest) as caught:
        await client.count_tokens("Hi")
    error = caught.value
    assert (error.reason, error.request_id, error.retry_after) == ("SCHEMA_VIOLATION", "6d1a", None)
    assert error.violations == (
        Violation("messages[1].content", "longer than 4096 characters"),
        Violation("top_p", "must be in (0, 1], got 1.5"),
    )


async def test_broken_details_are_none(client: Client, server: ScriptedServer) -> None:
    """Details that are not a google.rpc.Status do not hide the status itself."""
    server.refuses(grpc.StatusCode.INTERNAL, "engine down", raw_details=b"\xff\xff\xff")
    with pytest.raises(tree.InternalError, match="engine down") as caught:
        await client.generate("Hi")
    assert caught.value.reason is None


async def test_a_detail_that_does_not_decode_is_passed_over(client: Client, server: ScriptedServer) -> None:
    """One broken detail does not hide the others."""
    broken = b"\x1a\x2e\n\x28type.googleapis.com/google.rpc.RetryInfo\x12\x02\xff\xff"
    server.refuses(grpc.StatusCode.INTERNAL, "engine down", raw_details=broken)
    with pytest.raises(tree.InternalError, match="engine down") as caught:
        await client.generate("Hi")
    assert caught.value.retry_after is None


async def test_nobody_listening_is_unavailable() -> None:
    """A refused connection has no details and is Unavailable all the same."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with Client(f"127.0.0.1:{unused.getsockname()[1]}", timeout=10) as client:
            with pytest.raises(tree.Unavailable) as caught:
                await client.model_card()
    assert caught.value.reason is None
    assert caught.value.violations == ()


def test_the_package_exports_what_it_names() -> None:
    """Every name in `__all__` is there, and no other name is made up."""
    for name in llama2_client.__all__:
        assert getattr(llama2_client, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = llama2_client.Nothing
