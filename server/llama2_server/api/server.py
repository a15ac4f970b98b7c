"""The ports: what a peer may do on a connection, TLS, the services' port, and the one for probes.

docs/networking.md has the table of the limits, with the reason for each.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from llama2.v1 import (
    account_pb2,
    account_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    text_generation_pb2,
    text_generation_pb2_grpc,
)
from llama2_server.api.account_service import AccountServicer
from llama2_server.api.health import HealthServicer
from llama2_server.api.interceptor import CallInterceptor
from llama2_server.api.model_service import ModelServicer
from llama2_server.api.text_generation import Parts, TextGenerationServicer
from llama2_server.api.tls import CertificateFiles, RotatingCertificates
from llama2_server.config.settings import Settings, is_loopback
from llama2_server.configuration_error import ConfigurationError

logger = logging.getLogger(__name__)

SERVICES = (
    text_generation_pb2.DESCRIPTOR.services_by_name["TextGenerationService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    account_pb2.DESCRIPTOR.services_by_name["AccountService"].full_name,
)
METHODS = tuple(
    f"{service.full_name}/{method.name}"
    for file in (text_generation_pb2, model_pb2, account_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)
SPARE_STREAMS = 100  # health watches, card and usage, beside the calls that generate
HEALTH_STREAMS = 100
HEALTH_MESSAGE_BYTES = 4096
HEALTH_STOP_SECONDS = 1.0


def connection_options(settings: Settings, *, streams: int, message_bytes: int) -> list[tuple[str, Any]]:
    """The options of gRPC for everything that a peer could let grow."""
    return [
        # Without it a second server would share the port in silence.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", message_bytes),
        # Between the two gRPC would refuse by chance.
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        # gRPC advertises no limit by default: one connection could open any number of calls.
        ("grpc.max_concurrent_streams", streams),
        ("grpc.max_connection_idle_ms", _milliseconds(settings.max_connection_idle_seconds)),
        ("grpc.max_connection_age_ms", _milliseconds(settings.max_connection_age_seconds)),
        ("grpc.max_connection_age_grace_ms", _milliseconds(settings.max_connection_age_grace_seconds)),
        ("grpc.keepalive_time_ms", _milliseconds(settings.keepalive_time_seconds)),
        ("grpc.keepalive_timeout_ms", _milliseconds(settings.keepalive_timeout_seconds)),
        # Without it a peer that answers no ping is noticed after a minute, whatever the line above says (1.85.1).
        ("grpc.http2.ping_timeout_ms", _milliseconds(settings.keepalive_timeout_seconds)),
        # One rule for pings, with calls or without: else gRPC's own for the latter is two hours.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(settings.min_ping_interval_seconds)),
        ("grpc.server_handshake_timeout_ms", _milliseconds(settings.handshake_timeout_seconds)),
    ]


def make_server(
    settings: Settings,
    parts: Parts,
    servicer: TextGenerationServicer,
    health: HealthServicer,
    interceptor: CallInterceptor,
) -> grpc.aio.Server:
    """The server of all services; it has no port yet."""
    streams = settings.max_queue_size + parts.card.max_concurrent_requests + SPARE_STREAMS
    options = connection_options(
        settings,
        streams=settings.max_concurrent_streams or streams,
        message_bytes=settings.max_message_bytes,
    )
    server = grpc.aio.server(interceptors=[interceptor], options=options)
    text_generation_pb2_grpc.add_TextGenerationServiceServicer_to_server(servicer, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(parts.card), server)
    usage = AccountServicer(parts.accounts, parts.quota, parts.ledger)
    account_pb2_grpc.add_AccountServiceServicer_to_server(usage, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if settings.reflection:
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((*SERVICES, health_name, reflection.SERVICE_NAME), server)
    return server


def add_port(server: grpc.aio.Server, settings: Settings) -> str:
    """The address of the services' port, with the number that was taken for port 0.

    Raises:
        CertificateError: the certificate's files cannot be used.
        ConfigurationError: the address cannot be listened on.
    """
    if settings.tls_certificate is None or settings.tls_key is None:
        if settings.api_keys_file is not None and not is_loopback(settings.listen):
            logger.warning(
                "API keys cross the network in the clear: give tls_certificate and tls_key, or see to TLS before"
            )
        return _bind(server, "listen", settings.listen, None)
    files = CertificateFiles(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    return _bind(server, "listen", settings.listen, RotatingCertificates(files).credentials())


@dataclass(frozen=True, slots=True)
class HealthPort:
    """The health service, and where it is to be had besides on the port of all services."""

    servicer: HealthServicer
    address: str | None


@asynccontextmanager
async def health_port(settings: Settings) -> AsyncIterator["HealthPort"]:
    """The health service, not serving yet; for the body on a plaintext port of its own, if the settings name one.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    health = HealthServicer(SERVICES)
    if settings.health_listen is None:
        yield HealthPort(health, None)
        return
    options = connection_options(settings, streams=HEALTH_STREAMS, message_bytes=HEALTH_MESSAGE_BYTES)
    server = grpc.aio.server(options=options)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    address = _bind(server, "health_listen", settings.health_listen, None)
    await server.start()
    logger.info("health on %s", address)
    try:
        yield HealthPort(health, address)
    finally:
        health.close()
        await server.stop(HEALTH_STOP_SECONDS)


def _bind(server: grpc.aio.Server, setting: str, listen: str, credentials: grpc.ServerCredentials | None) -> str:
    try:
        port = server.add_insecure_port(listen) if credentials is None else server.add_secure_port(listen, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        flag = setting.replace("_", "-")
        raise ConfigurationError(f"--{flag}: cannot listen on {listen}; the port may be in use: choose another one")
    return f"{listen.rpartition(':')[0]}:{port}"


def _milliseconds(seconds: float) -> int:
    # gRPC's numbers have 31 bits; its largest one means for ever.
    return max(1, round(min(seconds * 1000, 2**31 - 1)))
