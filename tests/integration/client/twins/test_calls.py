"""Both clients return the same results and raise the same errors."""

from __future__ import annotations

import asyncio
import gc
import re
from datetime import date, datetime
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as ProtobufMessage
from google.rpc import error_details_pb2
from tests.integration.client.samples import EVERY_OPTION, EVERY_OPTION_REQUEST, REPLY, TOKEN_COUNT
from tests.integration.client.twins.twin import Twin
from tests.support.scripted_server import CARD, USAGE, ScriptedServer

from llama2.v1 import account_pb2, text_generation_pb2
from llama2_client import (
    Client,
    DeadlineExceeded,
    HealthStatus,
    Llama2Error,
    Message,
    SyncClient,
)

RETRY = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=11, nanos=500_000_000))
VIOLATION = error_details_pb2.BadRequest.FieldViolation(field="top_p", description="must be in (0, 1], got 1.5")
DETAILS: list[tuple[grpc.StatusCode, list[ProtobufMessage]]] = [
    (grpc.StatusCode.INVALID_ARGUMENT, [error_details_pb2.BadRequest(field_violations=[VIOLATION])]),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, [error_details_pb2.QuotaFailure(), RETRY]),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, [RETRY]),
    (grpc.StatusCode.INTERNAL, [error_details_pb2.RequestInfo(request_id="6d1a")]),
    *((code, []) for code in grpc.StatusCode if code is not grpc.StatusCode.OK),
]


async def test_every_call_returns_its_result(twin: Twin, server: ScriptedServer) -> None:
    """Each method sends its request and returns its result."""
    assert await twin.call("generate", "Hi", **EVERY_OPTION) == REPLY
    deltas: list[str] = []
    assert await twin.read(deltas, "Hi", raw=True) == REPLY
    assert deltas == ["Hello", " world"]
    assert await twin.call("count_tokens", "Hi") == TOKEN_COUNT
    assert await twin.call("model_card") == CARD
    assert await twin.call("usage", since=date(2026, 11, 2)) == USAGE
    assert await twin.call("health") is HealthStatus.SERVING
    assert await twin.call("health", "missing") is HealthStatus.SERVICE_UNKNOWN
    assert server.requests[0] == EVERY_OPTION_REQUEST
    assert server.requests[1] == text_generation_pb2.GenerateRequest(prompt="Hi", raw=True)
    assert server.requests[4] == account_pb2.GetUsageRequest(since="2026-11-02")


async def test_a_chat_sends_the_turns_before(twin: Twin, server: ScriptedServer) -> None:
    """A chat's history has its completed turns, and each turn sends them."""
    history = await twin.converse("1", "2", system="Be brief.")
    assert history == (
        Message("system", "Be brief."),
        Message("user", "1"),
        Message("assistant", "Hello world"),
        Message("user", "2"),
        Message("assistant", "Hello world"),
    )
    assert server.requests[1] == text_generation_pb2.GenerateRequest(
        messages=[text_generation_pb2.ChatMessage(role=m.role, content=m.content) for m in history[:-1]]
    )


@pytest.mark.parametrize(("code", "details"), DETAILS)
async def test_both_raise_the_same_error(
    server: ScriptedServer, code: grpc.StatusCode, details: list[ProtobufMessage]
) -> None:
    """Each status raises equal errors from both clients, for whole replies and after the first text of a stream."""
    server.script_error(code, "the reason", *details, after=("Once",), pushback_ms=-1)
    raised: list[tuple[object, ...]] = []
    for kind in (Client, SyncClient):
        async with Twin.connected(kind, server.address, timeout=10, resume=False) as twin:
            deltas: list[str] = []
            for call in (twin.call("generate", "Hi"), twin.read(deltas, "Hi")):
                with pytest.raises(Llama2Error) as caught:
                    await call
                error = caught.value
                violations = [violation.field for violation in error.violations]
                facts = (type(error), error.code, error.message, error.retry_after, error.request_id, violations)
                raised.append((*facts, error.status.SerializeToString(deterministic=True)))
            assert deltas == ["Once"]
    assert raised[0][:3] == (type(error), code, "the reason")
    assert len(set(map(repr, raised))) == 1


async def test_the_deadline_is_sent_and_enforced(twin: Twin, server: ScriptedServer) -> None:
    """The server receives the deadline; a call that exceeds it is cancelled there and raises DeadlineExceeded.

    On a slow machine, a deadline could pass before the call reaches the server. Then the test takes twice the time.
    """
    server.script_hang()
    seconds = 0.5
    while not server.requests:
        with pytest.raises(DeadlineExceeded):
            await twin.call("generate", "Hi", timeout=seconds)
        seconds *= 2
    await asyncio.wait_for(server.cancelled.wait(), 60)
    assert 0 <= (server.remaining_seconds[0] or -1) <= seconds


WRONG_TYPES: list[tuple[str, dict[str, Any], str]] = [
    ("generate", {"prompt": 5}, "prompt: must be a string, got int"),
    ("generate", {"prompt": b"Hi"}, "prompt: must be a string, got bytes"),
    ("generate", {"prompt": "Hi", "raw": 1}, "raw: must be True or False, got int"),
    ("generate", {"prompt": "Hi", "max_tokens": "7"}, "max_tokens: must be an integer, got str"),
    ("generate", {"prompt": "Hi", "max_tokens": True}, "max_tokens: must be an integer, got bool"),
    ("generate", {"prompt": "Hi", "seed": 1.0}, "seed: must be an integer, got float"),
    ("generate", {"prompt": "Hi", "top_k": [1]}, "top_k: must be an integer, got list"),
    ("generate", {"prompt": "Hi", "temperature": "hot"}, "temperature: must be a number, got str"),
    ("generate", {"prompt": "Hi", "top_p": False}, "top_p: must be a number, got bool"),
    ("generate", {"prompt": "Hi", "stop": 5}, "stop: must be a string or several strings, got int"),
    ("generate", {"prompt": "Hi", "stop": ["a", 5]}, "stop[1]: must be a string, got int"),
    ("generate", {"prompt": "Hi", "no_cache": "yes"}, "no_cache: must be True or False, got str"),
    ("generate", {"prompt": "Hi", "timeout": "5"}, "timeout: must be a number, got str"),
    ("generate", {"messages": "Hi"}, "messages: must be a list of messages, got str"),
    ("generate", {"messages": {"role": "user"}}, "messages: must be a list of messages, got dict"),
    ("generate", {"messages": 5}, "messages: must be a list of messages, got int"),
    ("generate", {"messages": ["Hi"]}, "messages[0]: must be a Message or a mapping with role and content, got str"),
    ("generate", {"messages": [{"role": 1}]}, "messages[0].role: must be a string, got int"),
    (
        "generate",
        {"messages": [{"role": "user", "text": "Hi"}]},
        "messages[0]: has the unknown key 'text'; a message has role and content",
    ),
    ("count_tokens", {"prompt": 5}, "prompt: must be a string, got int"),
    ("stream", {"prompt": 5}, "prompt: must be a string, got int"),
    ("stream", {"prompt": "Hi", "timeout": []}, "timeout: must be a number, got list"),
    ("usage", {"since": "2026-11-01"}, "since: must be a date, got str"),
    ("usage", {"until": datetime(2026, 11, 1)}, "until: must be a date, got datetime"),  # noqa: DTZ001
    ("health", {"service": None}, "service: must be a string, got NoneType"),
]


@pytest.mark.parametrize(("method", "arguments", "message"), WRONG_TYPES)
async def test_a_wrong_type_names_the_parameter(
    twin: Twin, server: ScriptedServer, method: str, arguments: dict[str, Any], message: str
) -> None:
    """A value of the wrong type raises TypeError with the name of its parameter, without a call."""
    call = twin.read([], **arguments) if method == "stream" else twin.call(method, **arguments)
    with pytest.raises(TypeError) as caught:
        await call
    assert str(caught.value) == message
    assert server.requests == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 5}, "target: must be a string, got int"),
        ({"api_key": 5}, "api_key: must be a string, got int"),
        ({"timeout": "5"}, "timeout: must be a number, got str"),
        ({"tls": "ca.pem"}, "tls: must be True, False, PEM bytes or gRPC channel credentials, got str"),
        ({"tls": True, "server_name": 5}, "server_name: must be a string, got int"),
        ({"max_attempts": 2.0}, "max_attempts: must be an integer, got float"),
        ({"quota_wait": None}, "quota_wait: must be a number, got NoneType"),
        ({"resume": 1}, "resume: must be True or False, got int"),
    ],
)
def test_a_wrong_type_of_the_client_names_the_parameter(
    kind: type[Client] | type[SyncClient], arguments: dict[str, Any], message: str
) -> None:
    """A value of the wrong type for the client itself raises TypeError with the name of its parameter."""
    with pytest.raises(TypeError) as caught:
        kind(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_attempts": 0}, "max_attempts: must be from 1 to 5, got 0"),
        ({"max_attempts": 6}, "max_attempts: must be from 1 to 5, got 6"),
        ({"quota_wait": -1}, "quota_wait: must be at least 0 seconds, got -1"),
        ({"tls": b"no certificate"}, "tls: must be a PEM certificate; pass the bytes of the authority's file"),
        ({"server_name": "a.example.com"}, "server_name: needs TLS; pass tls, too"),
    ],
)
def test_an_invalid_value_of_the_client_names_the_parameter(
    kind: type[Client] | type[SyncClient], arguments: dict[str, Any], message: str
) -> None:
    """An invalid value for the client itself raises ValueError with the name of its parameter."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kind(**arguments)


async def test_a_dropped_stream_is_cancelled(twin: Twin, server: ScriptedServer) -> None:
    """A loop that breaks without closing the stream cancels the call on the server."""
    server.script_hang(after=("Once", " upon"))
    if isinstance(twin.client, Client):
        async for _ in twin.client.stream("Hi"):
            break
    else:
        assert await asyncio.to_thread(next, twin.client.stream("Hi")) == "Once"
    gc.collect()
    await asyncio.wait_for(server.cancelled.wait(), 60)
