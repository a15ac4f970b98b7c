"""Errors of the `llama2` command: messages and exit codes."""

from __future__ import annotations

import asyncio
import json

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from tests.integration.client.cli.command import Result, run
from tests.support.scripted_server import ScriptedServer

LLAMA2_REASON = error_details_pb2.ErrorInfo(reason="SOME_REASON", domain="llama2.v1")
RETRY_IN_11_SECONDS = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=10, nanos=500_000_000))


@pytest.mark.parametrize(
    ("code", "details", "exit_code", "message"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, [], 2, "invalid request: the reason"),
        (
            grpc.StatusCode.UNAVAILABLE,
            [LLAMA2_REASON, RETRY_IN_11_SECONDS],
            3,
            "the server is not available: the reason; retry in 11 s",
        ),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            [error_details_pb2.QuotaFailure(), RETRY_IN_11_SECONDS],
            4,
            "llama2: the reason; retry in 11 s, or wait with --quota-wait 11",
        ),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            [RETRY_IN_11_SECONDS],
            4,
            "the server is busy: the reason; retry in 11 s",
        ),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, [], 4, "a limit is reached: the reason"),
        (grpc.StatusCode.UNAUTHENTICATED, [], 5, "not authenticated; set a valid key with LLAMA2_API_KEY or --api-key"),
        (grpc.StatusCode.PERMISSION_DENIED, [], 5, "not permitted: the reason"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, [], 6, "the deadline passed; allow more time with --timeout"),
        (grpc.StatusCode.INTERNAL, [error_details_pb2.RequestInfo(request_id="6d1a")], 1, "under request id 6d1a\n"),
        (grpc.StatusCode.UNIMPLEMENTED, [], 1, "the server does not have this method; check --address and"),
        (grpc.StatusCode.DATA_LOSS, [], 1, "DATA_LOSS: the reason"),
    ],
)
async def test_each_status_has_its_exit_code(
    server: ScriptedServer, code: grpc.StatusCode, details: list[Message], exit_code: int, message: str
) -> None:
    """Each status has a message and an exit code; the output never contains a traceback or the key."""
    server.script_error(code, "the reason", *details, pushback_ms=-1)
    result = await run(server.address, "generate", "Hi", LLAMA2_API_KEY="s3cret")
    assert (result.code, result.out) == (exit_code, "")
    assert message in result.err
    assert result.err.startswith("llama2: ")
    assert len(result.err.splitlines()) == 1
    assert "Traceback" not in result.err
    assert "s3cret" not in result.err


async def test_each_violation_has_its_line(server: ScriptedServer) -> None:
    """Every violation is printed on one line after its field; with --json, the error is a google.rpc.Status."""
    field_violation = error_details_pb2.BadRequest.FieldViolation
    server.script_error(
        grpc.StatusCode.INVALID_ARGUMENT,
        "2 violations",
        LLAMA2_REASON,
        error_details_pb2.BadRequest(
            field_violations=[
                field_violation(field="top_p", description="must be in (0, 1], got 1.5"),
                field_violation(description="neither prompt nor messages"),
            ]
        ),
    )
    plain, as_json = await asyncio.gather(
        run(server.address, "tokens", "Hi"), run(server.address, "tokens", "Hi", "--json")
    )
    assert plain == Result(2, "", "llama2: top_p: must be in (0, 1], got 1.5\nllama2: neither prompt nor messages\n")
    assert (as_json.code, as_json.out) == (2, "")
    status = ParseDict(json.loads(as_json.err)["error"], status_pb2.Status())
    assert (status.code, status.message) == (3, "2 violations")
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad_request)
    assert info == LLAMA2_REASON
    assert [violation.field for violation in bad_request.field_violations] == ["top_p", ""]


async def test_unknown_details_are_left_out_of_json(server: ScriptedServer) -> None:
    """A detail of a type that this client does not know, or with malformed bytes, does not hide the error."""
    status = status_pb2.Status(code=13, message="the engine failed")
    status.details.add(type_url="type.googleapis.com/new.Detail", value=b"1")
    status.details.add(type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\xff")
    server.script_error(grpc.StatusCode.INTERNAL, "the engine failed", raw_details=status.SerializeToString())
    result = await run(server.address, "generate", "Hi", "--json")
    assert json.loads(result.err) == {"error": {"code": 13, "message": "the engine failed"}}


async def test_an_invalid_key_is_not_shown(server: ScriptedServer) -> None:
    """A key that a header cannot contain is a usage error, and the message does not repeat the key."""
    result = await run(server.address, "card", LLAMA2_API_KEY="s3crét")
    assert result.code == 2
    assert "LLAMA2_API_KEY: must be printable ASCII" in result.err
    assert "s3cr" not in result.err


async def test_an_error_after_text_starts_a_new_line(server: ScriptedServer) -> None:
    """A reply that breaks off keeps its text, and the error starts on a new line."""
    server.script_error(grpc.StatusCode.INTERNAL, "the engine failed", after=("Half a",))
    assert await run(server.address, "generate", "Hi") == Result(
        1, "Half a\n", "llama2: the server failed: the engine failed\n"
    )
