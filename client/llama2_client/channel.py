"""The gRPC channel of a client: its targets, retries, balancing and limits."""

from __future__ import annotations

import json
import re

import grpc

from llama2.v1 import account_pb2, model_pb2, text_generation_pb2

DEFAULT_PORT = 50051
_SCHEMES = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):|[a-z][a-z0-9+.-]*://")

_SERVICE_CONFIG = {
    # A headless Kubernetes service resolves to one address a pod: each gets calls in turn.
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [
                {"service": text_generation_pb2.DESCRIPTOR.services_by_name["TextGenerationService"].full_name},
                {"service": model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name},
                {"service": account_pb2.DESCRIPTOR.services_by_name["AccountService"].full_name},
            ],
            # gRPC itself retries, after a jittered backoff or the server's own pushback, within the deadline and only
            # before the first message: no reply is ever begun twice. CANCELLED is what a call gets that reaches a gRPC
            # server just when it stops.
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
}

_CHANNEL_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.enable_retries", 1),
    # gRPC servers close connections that are pinged more often than every five minutes, unless they are told otherwise.
    ("grpc.keepalive_time_ms", 310_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A server that was restarted is found again before the last retry of a call that needs it; gRPC's own limit is two
    # minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # The addresses of new replicas are asked for as soon as a connection goes; gRPC would wait for 30 seconds.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # The longest reply is far below this; a request that a server could accept is too.
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.max_send_message_length", 4 * 1024 * 1024),
)


def open_channel(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """A channel, which connects at its first call; it belongs to the event loop that runs now."""
    if credentials is None:
        return grpc.aio.insecure_channel(target, _CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(target, credentials, _CHANNEL_OPTIONS)


def grpc_target(target: str) -> str:
    """Resolve plain addresses by DNS, on the default port where none is given; leave gRPC's own targets alone."""
    if _SCHEMES.match(target):
        return target
    if target.count(":") > 1 and not target.startswith("["):
        target = f"[{target}]"  # a bare IPv6 address
    if not re.search(r"[^:]:\d+$", target):
        target = f"{target}:{DEFAULT_PORT}"
    return f"dns:///{target}"


def credentials_of(tls: bool | bytes | grpc.ChannelCredentials) -> grpc.ChannelCredentials | None:
    """The credentials that `Client`'s `tls` asks for; None for plain text."""
    match tls:
        case False:
            return None
        case True:
            return grpc.ssl_channel_credentials()
        case bytes():
            return grpc.ssl_channel_credentials(root_certificates=tls)
        case _:
            return tls
