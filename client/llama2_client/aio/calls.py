"""Calls of the async client: retries and the translation of errors."""

# ruff: noqa: ASYNC109 - gRPC sends the deadline of a call to the server; `asyncio.timeout` cannot.
from __future__ import annotations

import asyncio
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from llama2_client.arguments import check_type
from llama2_client.attempts import Attempts
from llama2_client.connection_errors import PROBE_SECONDS, without_connection
from llama2_client.errors import Llama2Error, from_rpc_error
from llama2_client.reply import HealthStatus
from llama2_client.settings import ClientSettings

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)


async def unary(
    settings: ClientSettings,
    channel: grpc.aio.Channel,
    method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
    request: _Request,
    timeout: float | None,
) -> _Response:
    """Return the response of a call; wait for the quota if the settings allow it. Raise Llama2Error."""
    attempts = Attempts(settings, timeout)
    while True:
        try:
            return await method(request, timeout=attempts.remaining(), metadata=settings.metadata)
        except grpc.aio.AioRpcError as error:
            translated = await translate(settings, channel, error)
            delay = attempts.delay(translated)
            if delay is None:
                raise translated from error
        await asyncio.sleep(delay)


async def check_health(
    settings: ClientSettings, channel: grpc.aio.Channel, service: str, timeout: float | None
) -> HealthStatus:
    """Return the health of a service. Raise Llama2Error."""
    check_type("service", service, str, "a string")
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        response = await unary(settings, channel, _health_method(channel), request, timeout)
    except Llama2Error as error:
        if error.code is grpc.StatusCode.NOT_FOUND:
            return HealthStatus.SERVICE_UNKNOWN
        raise
    return HealthStatus(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


async def translate(settings: ClientSettings, channel: grpc.aio.Channel, error: grpc.aio.AioRpcError) -> Llama2Error:
    """Return the exception for a gRPC error.

    If the deadline passed while gRPC tried to connect, the exception has the reason why it could not connect.
    """
    translated = from_rpc_error(error)
    if not without_connection(translated, channel.get_state()):
        return settings.explain(translated)
    try:
        # A call that is not retried fails immediately with the error of the last attempt to connect.
        await _health_method(channel)(health_pb2.HealthCheckRequest(), timeout=PROBE_SECONDS)
    except grpc.aio.AioRpcError as probe:
        if probe.code() is grpc.StatusCode.UNAVAILABLE:
            return settings.explain(from_rpc_error(probe))
        return settings.explain(translated, connected=False)
    return translated


def _health_method(
    channel: grpc.aio.Channel,
) -> grpc.aio.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]:
    return channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
