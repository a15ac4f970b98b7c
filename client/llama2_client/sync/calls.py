"""Calls of the synchronous client: retries and the translation of errors."""

from __future__ import annotations

import threading
import time
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
from llama2_client.sync.interrupts import interruptible, start_call

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)


def open_channel(settings: ClientSettings) -> grpc.Channel:
    """Open a channel; it connects at its first call."""
    if settings.credentials is None:
        return grpc.insecure_channel(settings.target, settings.channel_options)
    return grpc.secure_channel(settings.target, settings.credentials, settings.channel_options)


def unary(
    settings: ClientSettings,
    channel: grpc.Channel,
    method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
    request: _Request,
    timeout: float | None,
) -> _Response:
    """Return the response of a call; wait for the quota if the settings allow it. Raise Llama2Error."""
    attempts = Attempts(settings, timeout)
    while True:
        try:
            return _result(_start_future(settings, method, request, attempts.remaining()))
        except grpc.RpcError as error:
            translated = translate(settings, channel, error)
            delay = attempts.delay(translated)
            if delay is None:
                raise translated from error
        time.sleep(delay)


def check_health(settings: ClientSettings, channel: grpc.Channel, service: str, timeout: float | None) -> HealthStatus:
    """Return the health of a service. Raise Llama2Error."""
    check_type("service", service, str, "a string")
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        response = unary(settings, channel, _health_method(channel), request, timeout)
    except Llama2Error as error:
        if error.code is grpc.StatusCode.NOT_FOUND:
            return HealthStatus.SERVICE_UNKNOWN
        raise
    return HealthStatus(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def translate(settings: ClientSettings, channel: grpc.Channel, error: grpc.RpcError) -> Llama2Error:
    """Return the exception for a gRPC error.

    If the deadline passed while gRPC tried to connect, the exception has the reason why it could not connect.
    """
    translated = from_rpc_error(error)
    if not without_connection(translated, _state(channel)):
        return settings.explain(translated)
    try:
        # A call that is not retried fails immediately with the error of the last attempt to connect.
        _health_method(channel)(health_pb2.HealthCheckRequest(), timeout=PROBE_SECONDS)
    except grpc.RpcError as probe:
        if probe.code() is grpc.StatusCode.UNAVAILABLE:
            return settings.explain(from_rpc_error(probe))
        return settings.explain(translated, connected=False)
    return translated


def _start_future(
    settings: ClientSettings,
    method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
    request: _Request,
    timeout: float | None,
) -> grpc.Future[_Response]:
    return start_call(lambda: method.future(request, timeout=timeout, metadata=settings.metadata))


def _result(future: grpc.Future[_Response]) -> _Response:
    """Return the result of a call. Ctrl-C cancels the call."""
    try:
        with interruptible():
            return future.result()
    except BaseException:
        future.cancel()
        raise


def _state(channel: grpc.Channel) -> grpc.ChannelConnectivity:
    """Return the state of a channel, which gRPC passes only to callbacks."""
    states: list[grpc.ChannelConnectivity] = []
    changed = threading.Event()

    def on_change(state: grpc.ChannelConnectivity) -> None:
        states.append(state)
        changed.set()

    channel.subscribe(on_change)
    changed.wait(PROBE_SECONDS)
    channel.unsubscribe(on_change)
    return states[0] if states else grpc.ChannelConnectivity.IDLE


def _health_method(
    channel: grpc.Channel,
) -> grpc.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]:
    return channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
