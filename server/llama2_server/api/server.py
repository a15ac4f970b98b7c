"""The ports: connection limits, TLS, the services' port, and the health port.

docs/networking.md has the table of the limits, with the reason for each.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from llama2.hosted.v1 import hosted_endpoint_pb2, hosted_endpoint_pb2_grpc
from llama2.v1 import (
    account_pb2,
    account_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    text_generation_pb2,
    text_generation_pb2_grpc,
)
from llama2_server.admission.accounts import Authenticator
from llama2_server.admission.call_budget import CallBudget
from llama2_server.admission.quota import Quota
from llama2_server.api.account_service import AccountServicer
from llama2_server.api.health import HealthServicer
from llama2_server.api.hosted.endpoint import HostedEndpointServicer
from llama2_server.api.hosted.envelope import error_trailers
from llama2_server.api.incoming.keyless_calls import KeylessCalls
from llama2_server.api.incoming.message_check import MessageCheck
from llama2_server.api.interceptor import CallInterceptor
from llama2_server.api.model_service import Execution, ModelServicer
from llama2_server.api.reflection import REFLECTION_SERVICES, ReflectionServicer, described_files
from llama2_server.api.text_generation import TextGenerationServicer
from llama2_server.api.tls import RotatingCertificates
from llama2_server.api.validation.bounds import Bounds
from llama2_server.card import ModelCard
from llama2_server.config.settings import Settings
from llama2_server.configuration_error import ConfigurationError
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.engine.step_runner import StepKind
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.receipts.keys import ReceiptKeys
from llama2_server.telemetry.telemetry import Telemetry
from llama2_server.usage.ledger import Ledger

logger = logging.getLogger(__name__)

HOSTED_ENDPOINT = hosted_endpoint_pb2.DESCRIPTOR.services_by_name["HostedEndpointService"].full_name
SERVICES = (
    text_generation_pb2.DESCRIPTOR.services_by_name["TextGenerationService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    account_pb2.DESCRIPTOR.services_by_name["AccountService"].full_name,
    HOSTED_ENDPOINT,
)
METHODS = tuple(
    f"{service.full_name}/{method.name}"
    for file in (text_generation_pb2, model_pb2, account_pb2, hosted_endpoint_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)
MIN_STREAMS = 100  # HTTP/2's recommendation; it leaves streams for watches, card and usage calls
# Calls that have arrived and wait for the event loop, of all connections. Each takes about 7 KB, also without a key.
MAX_PENDING_CALLS = 400
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
HEALTH_STREAMS = 100
HEALTH_MESSAGE_BYTES = 4096
HEALTH_STOP_SECONDS = 1.0


# gRPC rejects a message beyond its own limit before it reads it, but without details. This limit is above the bodies of
# 1 MiB that examples/envoy accepts, so that these get details. An unfinished message can take this much memory.
GRPC_MESSAGE_BYTES = 1024 * 1024 + 128 * 1024


class TorchProperties(Protocol):
    """Properties of the loaded model that clients can ask for."""

    @property
    def device(self) -> object:
        """The torch device."""

    @property
    def dtype(self) -> object:
        """The torch dtype."""

    @property
    def kernels(self) -> str:
        """The family of the native kernels; empty if the model does not run natively."""


class Servicers(NamedTuple):
    """One servicer per gRPC service of the protos."""

    text_generation: TextGenerationServicer
    model: ModelServicer
    account: AccountServicer
    hosted_endpoint: HostedEndpointServicer

    @classmethod
    def of(
        cls,
        text_generation: TextGenerationServicer,
        card: ModelCard,
        authenticator: Authenticator,
        quota: Quota,
        ledger: Ledger,
        model: TorchProperties,
        step: StepKind,
        fingerprint: Fingerprint,
        receipt_keys: ReceiptKeys | None,
    ) -> "Servicers":
        """Return all servicers, which share the one of text generation."""
        dtype = str(model.dtype).removeprefix("torch.")
        execution = Execution(str(model.device), dtype, step, model.kernels, fingerprint, receipt_keys)
        return cls(
            text_generation,
            ModelServicer(card, authenticator, quota, execution),
            AccountServicer(authenticator, quota, ledger),
            HostedEndpointServicer(card, authenticator, text_generation),
        )


def connection_options(settings: Settings, *, streams: int, message_bytes: int) -> list[tuple[str, Any]]:
    """Return gRPC's options, which limit each resource that a client can consume."""
    return [
        # With port sharing, a second server would start on the same port without an error.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", message_bytes),
        # Between the soft and the hard limit gRPC rejects at random; equal limits make it deterministic.
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        # By default gRPC advertises no limit: one connection could open any number of calls.
        ("grpc.max_concurrent_streams", streams),
        # Equal limits for the reason above. gRPC's own limits are 1,000 and 3,000.
        ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
        ("grpc.max_connection_idle_ms", _milliseconds(settings.max_connection_idle_seconds)),
        ("grpc.max_connection_age_ms", _milliseconds(settings.max_connection_age_seconds)),
        ("grpc.max_connection_age_grace_ms", _milliseconds(settings.max_connection_age_grace_seconds)),
        ("grpc.keepalive_time_ms", _milliseconds(settings.keepalive_time_seconds)),
        ("grpc.keepalive_timeout_ms", _milliseconds(settings.keepalive_timeout_seconds)),
        # Without this option gRPC 1.85.1 waits a minute for a ping's answer, regardless of the keepalive timeout.
        ("grpc.http2.ping_timeout_ms", _milliseconds(settings.keepalive_timeout_seconds)),
        # One rule for pings with and without calls: gRPC's own minimum interval without calls is two hours.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(settings.min_ping_interval_seconds)),
        ("grpc.server_handshake_timeout_ms", _milliseconds(settings.handshake_timeout_seconds)),
    ]


def make_interceptor(
    settings: Settings, telemetry: Telemetry, authenticator: Authenticator, card: ModelCard, tokenizer: Tokenizer
) -> CallInterceptor:
    """Return the interceptor of the services' port."""
    return CallInterceptor(
        telemetry,
        settings.max_message_bytes or 2 * Bounds(card, tokenizer).longest_text_bytes,
        authenticator,
        CallBudget(settings.max_free_calls_per_minute, settings.max_keyless_calls_per_minute),
        KeylessCalls(settings.max_keyless_calls),
        {HOSTED_ENDPOINT: error_trailers},
    )


def make_server(
    settings: Settings, servicers: Servicers, health: HealthServicer, interceptor: CallInterceptor, *, slots: int
) -> grpc.aio.Server:
    """Return the server of all services. It has no port yet."""
    options = connection_options(
        settings,
        streams=settings.max_concurrent_streams or max(MIN_STREAMS, slots + settings.max_queue_size),
        message_bytes=max(GRPC_MESSAGE_BYTES, 2 * interceptor.max_message_bytes),
    )
    server = grpc.aio.server(interceptors=[interceptor], options=options)
    text_generation_pb2_grpc.add_TextGenerationServiceServicer_to_server(servicers.text_generation, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(servicers.model, server)
    account_pb2_grpc.add_AccountServiceServicer_to_server(servicers.account, server)
    hosted_endpoint_pb2_grpc.add_HostedEndpointServiceServicer_to_server(servicers.hosted_endpoint, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if settings.reflection:
        services = (*SERVICES, HEALTH_SERVICE, *REFLECTION_SERVICES)
        ReflectionServicer(services, described_files()).add_to(server)
    return server


def add_port(server: grpc.aio.Server, listen: str, certificates: RotatingCertificates | None) -> str:
    """Bind the services' port, and return its address with the port number that replaces port 0.

    Raises:
        ConfigurationError: the server cannot listen on the address.
    """
    return _bind(server, "--listen", listen, None if certificates is None else certificates.credentials())


@dataclass(frozen=True, slots=True)
class HealthPort:
    """The health service, and the address of its dedicated port, if there is one."""

    servicer: HealthServicer
    address: str | None


@asynccontextmanager
async def health_port(settings: Settings) -> AsyncIterator[HealthPort]:
    """Create the health service, NOT_SERVING, and serve it during the body on its plaintext port, if one is set.

    Raises:
        ConfigurationError: the server cannot listen on the address.
    """
    health = HealthServicer(SERVICES)
    if settings.health_listen is None:
        yield HealthPort(health, None)
        return
    options = connection_options(settings, streams=HEALTH_STREAMS, message_bytes=2 * HEALTH_MESSAGE_BYTES)
    server = grpc.aio.server(
        interceptors=[MessageCheck(HEALTH_MESSAGE_BYTES, KeylessCalls(settings.max_keyless_calls))], options=options
    )
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    address = _bind(server, "--health-listen", settings.health_listen, None)
    await server.start()
    logger.info("health service listens on %s", address)
    try:
        yield HealthPort(health, address)
    finally:
        health.close()
        await server.stop(HEALTH_STOP_SECONDS)


def _bind(server: grpc.aio.Server, flag: str, listen: str, credentials: grpc.ServerCredentials | None) -> str:
    try:
        port = server.add_insecure_port(listen) if credentials is None else server.add_secure_port(listen, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigurationError(f"{flag}: cannot listen on {listen}; the port may be in use: choose another one")
    return f"{listen.rpartition(':')[0]}:{port}"


def _milliseconds(seconds: float) -> int:
    # gRPC reads 31 bits; the largest number means forever.
    return max(1, round(min(seconds * 1000, 2**31 - 1)))
