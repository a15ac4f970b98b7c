"""The gRPC channel of a client: target, TLS, retries, load balancing, limits and proxies."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import ssl

import grpc

from llama2.v1 import account_pb2, model_pb2, text_generation_pb2
from llama2_client.arguments import wrong_type

DEFAULT_PORT = 50051
MAX_ATTEMPTS = 5  # gRPC's own limit
_SCHEMES = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):|[a-z][a-z0-9+.-]*://")
_LOCAL_SCHEMES = ("unix:", "unix-abstract:", "vsock:")
# gRPC uses the first variable that is set. It reads the lower-case names only.
_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_NO_PROXY_VARIABLES = ("no_grpc_proxy", "no_proxy")

_OPTIONS: tuple[tuple[str, str | int], ...] = (
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


def service_config(max_attempts: int = MAX_ATTEMPTS) -> dict[str, object]:
    """Return gRPC's service config: load balancing, and the retries of every method of this API."""
    method: dict[str, object] = {
        "name": [
            {"service": text_generation_pb2.DESCRIPTOR.services_by_name["TextGenerationService"].full_name},
            {"service": model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name},
            {"service": account_pb2.DESCRIPTOR.services_by_name["AccountService"].full_name},
        ]
    }
    if max_attempts > 1:
        # gRPC itself retries: after a jittered backoff or the server's pushback, within the deadline, and only before
        # the first message, so that no reply starts twice. A call that reaches a gRPC server while the server stops
        # ends with CANCELLED.
        method["retryPolicy"] = {
            "maxAttempts": max_attempts,
            "initialBackoff": "0.1s",
            "maxBackoff": "2s",
            "backoffMultiplier": 3,
            "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
        }
    # A headless Kubernetes service resolves to one address per pod. Round robin spreads the calls over all of them.
    return {"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [method]}


def channel_options(target: str, max_attempts: int, server_name: str | None) -> tuple[tuple[str, str | int], ...]:
    """Return the options of a channel to this target."""
    options = (("grpc.service_config", json.dumps(service_config(max_attempts))), *_OPTIONS)
    if is_loopback(target):
        options += (("grpc.enable_http_proxy", 0),)  # a proxy would look for the server on its own machine
    if server_name is not None:
        options += (("grpc.ssl_target_name_override", server_name), ("grpc.default_authority", server_name))
    return options


def grpc_target(target: str) -> str:
    """Return the gRPC target of a plain address: resolved by DNS, with the default port if it has none.

    A target with a scheme of gRPC's, such as `unix:`, is returned unchanged.

    Raises:
        ValueError: the target is empty or a URL, or its port is not valid.
    """
    if target.lower().startswith(("http://", "https://", "grpc://", "grpcs://")):
        raise ValueError(f"target: must be HOST:PORT, not a URL; remove {target.partition('//')[0]}//")
    if not target or any(character.isspace() for character in target):
        raise ValueError("target: must be HOST:PORT without spaces, such as localhost:50051")
    if _SCHEMES.match(target):
        return target
    host, colon, port = target.rpartition(":")
    if colon and ":" not in host and not (port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"target: the port must be a number from 1 to 65535, got {port or 'nothing'}")
    if colon and not host:
        raise ValueError("target: the host is missing; pass HOST:PORT, such as localhost:50051")
    if target.count(":") > 1 and not target.startswith("["):
        target = f"[{target}]"  # a bare IPv6 address
    if not re.search(r"[^:]:\d+$", target):
        target = f"{target}:{DEFAULT_PORT}"
    return f"dns:///{target}"


def is_loopback(target: str) -> bool:
    """Return True if every address of a gRPC target is on this machine."""
    return target.startswith(_LOCAL_SCHEMES) or all(_is_loopback_host(host) for host in _hosts(target))


def proxy_variable(target: str) -> str | None:
    """Return the environment variable whose proxy gRPC uses for this target; None if it connects directly."""
    if is_loopback(target):
        return None
    variable = next((name for name in _PROXY_VARIABLES if name in os.environ), None)
    if variable is None or not os.environ[variable]:
        return None
    exceptions = next((os.environ[name] for name in _NO_PROXY_VARIABLES if name in os.environ), "")
    suffixes = tuple(entry.strip() for entry in exceptions.split(",") if entry.strip())
    return None if suffixes and all(host.endswith(suffixes) for host in _hosts(target)) else variable


def channel_credentials(tls: bool | bytes | grpc.ChannelCredentials) -> grpc.ChannelCredentials | None:
    """Return the channel credentials for the `tls` argument of a client; None for plain text.

    Raises:
        TypeError: the argument has another type.
        ValueError: the bytes are not a PEM certificate, which gRPC would only report as a failed connection.
    """
    match tls:
        case False:
            return None
        case True:
            return grpc.ssl_channel_credentials()
        case bytes():
            try:
                ssl.create_default_context(cadata=tls.decode("ascii"))
            except (ValueError, ssl.SSLError) as error:
                raise ValueError("tls: must be a PEM certificate; pass the bytes of the authority's file") from error
            return grpc.ssl_channel_credentials(root_certificates=tls)
        case grpc.ChannelCredentials():
            return tls
    raise wrong_type("tls", "True, False, PEM bytes or gRPC channel credentials", tls)


def _hosts(target: str) -> list[str]:
    """Return the host names or addresses of a target, without ports."""
    path = re.sub(r"^(?:[a-z0-9+.-]+://[^/]*/|[a-z0-9+.-]+:(?!\d+$))", "", target)
    return [re.sub(r":\d+$", "", part).strip("[]") for part in path.split(",")]


def _is_loopback_host(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
