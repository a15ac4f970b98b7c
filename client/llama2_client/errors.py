"""Exceptions for failed calls, built from the server's status and its details.

    Llama2Error
    ├── InvalidRequest         INVALID_ARGUMENT: `violations` names every invalid field
    ├── Unauthenticated        UNAUTHENTICATED: no API key, or an invalid one
    ├── PermissionDenied       PERMISSION_DENIED: the account is disabled
    ├── ResourceExhausted      RESOURCE_EXHAUSTED
    │   ├── QuotaExceeded        the account's quota is used up
    │   ├── BudgetExhausted      the request does not fit into the account's budget for the month
    │   ├── QueueFull            the request queue is full, or its wait too long
    │   └── TooManyRequests      too many calls that generate nothing
    ├── Unavailable            UNAVAILABLE: the server is unreachable, loading or shutting down
    ├── DeadlineExceeded       DEADLINE_EXCEEDED: the call's deadline passed
    ├── FailedPrecondition     FAILED_PRECONDITION: a broken stream cannot be continued
    ├── InternalError          INTERNAL: the server failed
    └── Unimplemented          UNIMPLEMENTED: the server does not have the method

Any other status code raises Llama2Error itself.
"""

from __future__ import annotations

import contextlib
import enum
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

STATUS_DETAILS_TRAILER = "grpc-status-details-bin"

_Detail = TypeVar("_Detail", bound=Message)


@dataclass(frozen=True, slots=True)
class Violation:
    """One invalid field of a request."""

    field: str  # a path such as "messages[2].content"; empty if the violation concerns the whole request
    description: str


class ConnectionProblem(enum.StrEnum):
    """The reason why no server of this API answered."""

    NAME_NOT_FOUND = "the name cannot be resolved"
    REFUSED = "the connection is refused, because nothing listens at this address"
    NO_ANSWER = "nothing answers at this address"
    CLOSED = "the server closes connections without TLS, as a server with TLS does"
    NO_TLS = "the server does not use TLS"
    UNTRUSTED_CERTIFICATE = "the server's certificate is not signed by a trusted authority"
    OTHER_SERVER_NAME = "the server's certificate is for another host name"
    CLIENT_CERTIFICATE = "the server closes connections without a client certificate that it trusts"
    PROXY = "the proxy does not connect to the server"
    NOT_GRPC = "the server at this address does not use gRPC"
    OTHER = "the connection failed"


class Llama2Error(Exception):
    """A failed call; the base class of all errors of this client.

    Raised itself for a status code without a subclass, such as CANCELLED or UNKNOWN. `code` has the status.
    """

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
        violations: tuple[Violation, ...] = (),
        problem: ConnectionProblem | None = None,
        status: status_pb2.Status | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.reason = reason  # the server's reason in UPPER_SNAKE_CASE; None if the status is not the service's own
        self.retry_after = retry_after  # seconds
        self.request_id = request_id
        self.violations = violations
        self.problem = problem  # the reason why no server answered; None if one did
        # The status with the server's details, as the API defines it.
        self.status = status or status_pb2.Status(code=self.code.value[0], message=message)


class InvalidRequest(Llama2Error):
    """Raised if the request breaks a rule of the API or of the model card. Fix every field in `violations`."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT


class Unauthenticated(Llama2Error):
    """Raised if the API key is missing, unknown or revoked. Pass a valid `api_key` to the client."""

    default_code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(Llama2Error):
    """Raised if the API key is valid but its account is disabled. Ask the operator to enable the account."""

    default_code = grpc.StatusCode.PERMISSION_DENIED


class ResourceExhausted(Llama2Error):
    """Raised itself if the request exceeds a limit of gRPC, such as 1.1 MiB per message. Send a smaller request."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class QuotaExceeded(ResourceExhausted):
    """Raised if the account has used up its requests per minute. Retry after exactly `retry_after` seconds."""


class BudgetExhausted(ResourceExhausted):
    """Raised if the highest price of the request does not fit into the account's neuron budget for the month.

    Lower `max_tokens`, or retry after `retry_after` seconds: the next month starts then, in UTC.
    """


class QueueFull(ResourceExhausted):
    """Raised if the request queue is full, or if the wait would exceed the deadline or the queue's limit.

    Retry after `retry_after` seconds, or set a longer `timeout`.
    """


class TooManyRequests(ResourceExhausted):
    """Raised if the account makes too many calls that generate nothing, such as token counts or invalid requests.

    Retry after `retry_after` seconds, and make fewer calls.
    """


class Unavailable(Llama2Error):
    """Raised if the server is unreachable, loading or shutting down, or if its engine or a store is unavailable.

    Raised only after the automatic retries have failed. Check the address, or retry after `retry_after` seconds.
    """

    default_code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(Llama2Error):
    """Raised if the call's deadline passes before the reply is complete. Set a longer `timeout`."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


class FailedPrecondition(Llama2Error):
    """Raised if a stream that broke off cannot be continued: its key has expired, or the model has changed.

    Send the request again; it is a new call.
    """

    default_code = grpc.StatusCode.FAILED_PRECONDITION


class InternalError(Llama2Error):
    """Raised if the server fails or ends a stream without a completion.

    Report `request_id` to the operator, if it is set: it identifies the call in the server's log.
    """

    default_code = grpc.StatusCode.INTERNAL


class Unimplemented(Llama2Error):
    """Raised if the server does not have the method, because it is older than the client or another service.

    Check the address and the version of the server.
    """

    default_code = grpc.StatusCode.UNIMPLEMENTED


_BY_CODE: dict[grpc.StatusCode, type[Llama2Error]] = {
    kind.default_code: kind
    for kind in (
        InvalidRequest,
        Unauthenticated,
        PermissionDenied,
        ResourceExhausted,
        Unavailable,
        DeadlineExceeded,
        FailedPrecondition,
        InternalError,
        Unimplemented,
    )
}


class RpcStatus(Protocol):
    """The status of a failed call: what an error of grpc and one of grpc.aio have in common."""

    def code(self) -> grpc.StatusCode:
        """Return the status code."""

    def details(self) -> str | None:
        """Return the message."""

    def trailing_metadata(self) -> Any:
        """Return the trailers: pairs of key and value, or None."""


def from_rpc_error(error: RpcStatus) -> Llama2Error:
    """Return the exception for a gRPC error, with the status details that the server sent."""
    message = error.details() or error.code().name
    status = _status(error)
    info = _detail(status, error_details_pb2.ErrorInfo)
    retry = _detail(status, error_details_pb2.RetryInfo)
    request = _detail(status, error_details_pb2.RequestInfo)
    bad_request = _detail(status, error_details_pb2.BadRequest)

    kind = _BY_CODE.get(error.code(), Llama2Error)
    if kind is ResourceExhausted:
        if _detail(status, error_details_pb2.QuotaFailure) is not None:
            kind = BudgetExhausted if info is not None and info.reason == "BUDGET_EXHAUSTED" else QuotaExceeded
        elif info is not None and info.reason == "TOO_MANY_REQUESTS":
            kind = TooManyRequests
        elif retry is not None:
            kind = QueueFull
    return kind(
        message,
        code=error.code(),
        reason=info.reason if info else None,
        retry_after=retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9 if retry else None,
        request_id=request.request_id if request else None,
        violations=tuple(Violation(v.field, v.description) for v in bad_request.field_violations)
        if bad_request
        else (),
        status=status,
    )


def _status(error: RpcStatus) -> status_pb2.Status:
    """Return the google.rpc.Status from the trailers, or one without details if it is missing or malformed."""
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_DETAILS_TRAILER and isinstance(value, bytes):
            with contextlib.suppress(DecodeError):
                return status_pb2.Status.FromString(value)
    return status_pb2.Status(code=error.code().value[0], message=error.details() or error.code().name)


def _detail(status: status_pb2.Status, kind: type[_Detail]) -> _Detail | None:
    """Return the first detail of this type, or None."""
    for packed in status.details:
        detail = kind()
        with contextlib.suppress(DecodeError):
            if packed.Unpack(detail):
                return detail
    return None
