"""The gRPC channel of a client: target, TLS, retries, load balancing and limits."""

from __future__ import annotations

import json
import re

import grpc

from llama2.v1 import account_pb2, model_pb2, text_generation_pb2

DEFAULT_PORT = 50051
_SCHEMES = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):|[a-z][a-z0-9+.-]*://")

_SERVICE_CONFIG = {
    # A headless Kubernetes service resolves to one address per pod. Round robin spreads the calls over all of them.
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [
                {"service": text_generation_pb2.DESCRIPTOR.services_by_name["TextGenerationService"].full_name},
                {"service": model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name},
                {"service": account_pb2.DESCRIPTOR.services_by_name["AccountService"].full_name},
            ],
            # gRPC itself retries: after a jittered backoff or the server's pushback, within the deadline, and only
            # before the first message, so that no reply starts twice. A call that reaches a gRPC server while the
            # server stops ends with CANCELLED.
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
    # By default, gRPC servers close connections that send pings more often than every five minutes.
    ("grpc.keepalive_time_ms", 310_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # With gRPC's own limit of two minutes, the last retry of a call could miss a server that has restarted.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Look up the addresses of new replicas soon after a connection is lost; gRPC waits 30 seconds by default.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # The longest reply and the largest request that a server accepts are far smaller.
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.max_send_message_length", 4 * 1024 * 1024),
)


def open_channel(target: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """Open a channel on the running event loop; it connects at its first call."""
    if credentials is None:
        return grpc.aio.insecure_channel(target, _CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(target, credentials, _CHANNEL_OPTIONS)


def grpc_target(target: str) -> str:
    """Return the gRPC target of a plain address: resolved by DNS, with the default port if it has none.

    A target with a scheme of gRPC's, such as `unix:`, is returned unchanged.
    """
    if _SCHEMES.match(target):
        return target
    if target.count(":") > 1 and not target.startswith("["):
        target = f"[{target}]"  # a bare IPv6 address
    if not re.search(r"[^:]:\d+$", target):
        target = f"{target}:{DEFAULT_PORT}"
    return f"dns:///{target}"


def channel_credentials(tls: bool | bytes | grpc.ChannelCredentials) -> grpc.ChannelCredentials | None:
    """Return the channel credentials for the `tls` argument of `Client`; None for plain text."""
    match tls:
        case False:
            return None
        case True:
            return grpc.ssl_channel_credentials()
        case bytes():
            return grpc.ssl_channel_credentials(root_certificates=tls)
        case _:
            return tls
