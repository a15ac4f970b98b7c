"""Failed calls of the `llama2` command: messages with remedies, and exit codes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from llama2_client import errors
from llama2_client.channel import grpc_target
from llama2_client.cli.usage_errors import flag_of, print_error_line
from llama2_client.connection_errors import describe
from llama2_client.errors import ConnectionProblem

# The most specific class comes first. `llama2 --help` documents the codes.
EXIT_CODES: tuple[tuple[type[errors.Llama2Error], int], ...] = (
    (errors.InvalidRequest, 2),
    (errors.Unavailable, 3),
    (errors.ResourceExhausted, 4),
    (errors.Unauthenticated, 5),
    (errors.PermissionDenied, 5),
    (errors.DeadlineExceeded, 6),
    (errors.Llama2Error, 1),
)
EXIT_UNREACHABLE = 3

_HEADLINES: tuple[tuple[type[errors.Llama2Error], str], ...] = (
    (errors.InvalidRequest, "invalid request: "),
    (errors.PermissionDenied, "not permitted: "),
    (errors.QueueFull, "the server is busy: "),
    (errors.QuotaExceeded, ""),
    (errors.TooManyRequests, ""),
    (errors.BudgetExhausted, ""),
    (errors.ResourceExhausted, "a limit is reached: "),
    (errors.Unavailable, "the server is not available: "),
    (errors.InternalError, "the server failed: "),
)

REMEDIES: dict[ConnectionProblem, str] = {
    ConnectionProblem.NAME_NOT_FOUND: "correct --address",
    ConnectionProblem.REFUSED: "start a server with `make run` or `llama2-server`, or correct --address",
    ConnectionProblem.NO_ANSWER: "correct --address, or check the network and its firewalls",
    ConnectionProblem.CLOSED: "add --tls, or --ca FILE with the certificate of the server's authority",
    ConnectionProblem.NO_TLS: "leave out --tls, --ca and --certificate, or start the server with a certificate",
    ConnectionProblem.UNTRUSTED_CERTIFICATE: "pass the certificate of the server's authority with --ca FILE",
    ConnectionProblem.OTHER_SERVER_NAME: "use a name of the certificate in --address, or pass it with --server-name",
    ConnectionProblem.CLIENT_CERTIFICATE: "pass a client certificate with --certificate FILE and --key FILE",
    ConnectionProblem.PROXY: "unset the variable {proxy}, or add the server's host to no_proxy",
    ConnectionProblem.NOT_GRPC: "correct --address, or check the proxy in front of the server",
    ConnectionProblem.OTHER: "check --address and the network",
}


def exit_code(error: errors.Llama2Error) -> int:
    """Return the exit code for an error."""
    if error.problem is not None:
        return EXIT_UNREACHABLE
    return next(code for kind, code in EXIT_CODES if isinstance(error, kind))


def print_error(error: errors.Llama2Error, address: str, *, as_json: bool) -> None:
    """Print an error and its remedy on standard error: one line, or one for each violation of a request."""
    if as_json:
        click.echo(json.dumps({"error": _status_json(error.status)}, ensure_ascii=False), err=True)
        return
    for line in _lines(error, address):
        print_error_line(line)


def _lines(error: errors.Llama2Error, address: str) -> Iterator[str]:
    if error.violations:
        for violation in error.violations:
            yield f"{flag_of(violation.field)}: {violation.description}" if violation.field else violation.description
    elif error.problem is not None:
        yield f"{address}: {describe(error, grpc_target(address), REMEDIES)}"
    else:
        yield "; ".join((_headline(error), *_remedies(error)))


def _headline(error: errors.Llama2Error) -> str:
    match error:
        case errors.Unauthenticated():
            return "not authenticated"
        case errors.DeadlineExceeded():
            return "the deadline passed"
        case errors.Unimplemented():
            return "the server does not have this method"
    words = next((words for kind, words in _HEADLINES if isinstance(error, kind)), f"{error.code.name}: ")
    return f"{words}{error.message}"


def _remedies(error: errors.Llama2Error) -> Iterator[str]:
    seconds = None if error.retry_after is None else max(1, math.ceil(error.retry_after))
    match error:
        case errors.Unauthenticated():
            yield "set a valid key with LLAMA2_API_KEY or --api-key"
        case errors.DeadlineExceeded():
            yield "allow more time with --timeout"
        case errors.Unimplemented():
            yield "check --address and the server's version"
        case errors.InternalError() if error.request_id is not None:
            yield f"find the cause in the server's log under request id {error.request_id}"
        case errors.BudgetExhausted():
            yield "see `llama2 usage`"
        case errors.QuotaExceeded() if seconds is not None:
            yield f"retry in {seconds} s, or wait with --quota-wait {seconds}"
        case _ if seconds is not None:
            yield f"retry in {seconds} s"


def _status_json(status: status_pb2.Status) -> dict[str, object]:
    """Return the JSON form of a google.rpc.Status, without details of unknown types."""
    known = status_pb2.Status(code=status.code, message=status.message)
    for detail in status.details:
        try:
            MessageToDict(detail)
        except (TypeError, ValueError, DecodeError):  # a type of a newer server, or malformed bytes
            continue
        known.details.append(detail)
    return MessageToDict(known, preserving_proto_field_name=True)
