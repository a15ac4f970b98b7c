"""Explanations for calls that no server answered: the problem, and how to fix it."""

from __future__ import annotations

import re

import grpc

from llama2_client.channel import proxy_variable
from llama2_client.errors import ConnectionProblem, DeadlineExceeded, Llama2Error

# How long a client looks for the reason why a call had no connection. gRPC returns the reason at once if it has one.
PROBE_SECONDS = 0.1
# gRPC's messages for a call without a connection, in all supported versions.
_NOT_CONNECTED = re.compile(
    "connections to all backends failing|failed to connect to all|errors resolving|resolution failed", re.IGNORECASE
)
_PATTERNS: tuple[tuple[str, ConnectionProblem], ...] = (
    ("errors resolving|resolution failed|lookup failed", ConnectionProblem.NAME_NOT_FOUND),
    ("WRONG_VERSION_NUMBER", ConnectionProblem.NO_TLS),
    ("CERTIFICATE_VERIFY_FAILED", ConnectionProblem.UNTRUSTED_CERTIFICATE),
    ("Hostname Verification|not in peer certificate", ConnectionProblem.OTHER_SERVER_NAME),
    ("alert.certificate|CERTIFICATE_REQUIRED", ConnectionProblem.CLIENT_CERTIFICATE),
    ("refused", ConnectionProblem.REFUSED),
    ("timed out|timeout|unreachable", ConnectionProblem.NO_ANSWER),
)
_CLOSED = re.compile("socket closed|reset|end of|EOF|closed", re.IGNORECASE)
# A proxy cannot cause these: they come from the TLS handshake with the server itself.
_BEHIND_PROXY = (
    ConnectionProblem.NO_TLS,
    ConnectionProblem.UNTRUSTED_CERTIFICATE,
    ConnectionProblem.OTHER_SERVER_NAME,
    ConnectionProblem.CLIENT_CERTIFICATE,
)

REMEDIES: dict[ConnectionProblem, str] = {
    ConnectionProblem.NAME_NOT_FOUND: "correct the address",
    ConnectionProblem.REFUSED: "start the server or correct the address",
    ConnectionProblem.NO_ANSWER: "correct the address, or check the network and its firewalls",
    ConnectionProblem.CLOSED: "connect with tls=True, or with the authority's certificate as tls=PEM",
    ConnectionProblem.NO_TLS: "connect with tls=False, or start the server with a certificate",
    ConnectionProblem.UNTRUSTED_CERTIFICATE: "pass the certificate of the server's authority as tls=PEM",
    ConnectionProblem.OTHER_SERVER_NAME: "connect to a name in the certificate, or pass one as server_name",
    ConnectionProblem.CLIENT_CERTIFICATE: "pass grpc.ssl_channel_credentials with a client certificate as tls",
    ConnectionProblem.PROXY: "unset the variable {proxy}, or add the server's host to no_proxy",
    ConnectionProblem.NOT_GRPC: "correct the address, or check the proxy in front of the server",
    ConnectionProblem.OTHER: "check the address and the network",
}


def without_connection(error: Llama2Error, state: grpc.ChannelConnectivity) -> bool:
    """Return True if the deadline passed while the channel, now in this state, had no connection."""
    waiting = (grpc.ChannelConnectivity.CONNECTING, grpc.ChannelConnectivity.TRANSIENT_FAILURE)
    return isinstance(error, DeadlineExceeded) and error.reason is None and state in waiting


def explain(error: Llama2Error, address: str, target: str, *, tls: bool, connected: bool = True) -> Llama2Error:
    """Return the error, with the problem and its remedy in the message if no server answered.

    Args:
        error: the error of the call.
        address: the address as the user gave it.
        target: the gRPC target of the address.
        tls: whether the client uses TLS.
        connected: False if the call had no connection when it ended.
    """
    problem = _problem(error, target, tls=tls, connected=connected)
    if problem is not None:
        error.problem = problem
        error.message = f"{address}: {describe(error, target, REMEDIES)}"
        error.args = (error.message,)
    return error


def describe(error: Llama2Error, target: str, remedies: dict[ConnectionProblem, str]) -> str:
    """Return the problem of the error and its remedy."""
    if error.problem is None:
        return error.message
    problem = error.problem.value
    if error.problem is ConnectionProblem.OTHER:
        problem = f"{problem} ({error.status.message})"
    proxy = proxy_variable(target) or "http_proxy"
    return f"{problem}; {remedies[error.problem].format(proxy=proxy)}"


def _problem(error: Llama2Error, target: str, *, tls: bool, connected: bool) -> ConnectionProblem | None:
    """Return the reason why no server answered; None if one did."""
    if error.reason is not None:
        return None
    if "http2 header with status" in error.message:
        return ConnectionProblem.NOT_GRPC if proxy_variable(target) is None else ConnectionProblem.PROXY
    if not connected:
        found = ConnectionProblem.NO_ANSWER
    elif error.code is grpc.StatusCode.UNAVAILABLE and _NOT_CONNECTED.search(error.message):
        found = _from_message(error.message, tls=tls)
    else:
        return None
    if proxy_variable(target) is not None and found not in _BEHIND_PROXY:
        return ConnectionProblem.PROXY
    return found


def _from_message(message: str, *, tls: bool) -> ConnectionProblem:
    for pattern, problem in _PATTERNS:
        if re.search(pattern, message, re.IGNORECASE):
            return problem
    if _CLOSED.search(message.partition("last error")[2]):
        # A server that requires a client certificate closes the connection after the client's part of the handshake.
        return ConnectionProblem.CLIENT_CERTIFICATE if tls else ConnectionProblem.CLOSED
    return ConnectionProblem.OTHER
