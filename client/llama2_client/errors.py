"""What can go wrong with a call, as exceptions that mirror the server's status details.

    Llama2Error
    ├── InvalidRequest           INVALID_ARGUMENT: `violations` names every field at fault
    ├── Unauthenticated          UNAUTHENTICATED: no key, or not a valid one
    ├── PermissionDenied         PERMISSION_DENIED: the account may not call this service
    ├── ResourceExhausted        RESOURCE_EXHAUSTED
    │   ├── QuotaExceeded          the account's quota; `retry_after` is the exact next time
    │   └── QueueFull               the server has too many calls waiting
    ├── Unavailable              UNAVAILABLE: not reachable, loading or draining
    ├── DeadlineExceeded         DEADLINE_EXCEEDED: the call's deadline passed first
    ├── InternalError              INTERNAL: a fault of the server; `request_id` finds it in the server's logs
    └── Unimplemented            UNIMPLEMENTED: the server does not know the method

Any other code raises Llama2Error itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

STATUS_DETAILS_TRAILER = "grpc-status-details-bin"

_Detail = TypeVar("_Detail", bound=Message)


@dataclass(frozen=True, slots=True)
class Violation:
    """One field of a request and what is wrong with it."""

    field: str  # a path such as "messages[2].content"; empty when the request as a whole is at fault
    description: str


class Llama2Error(Exception):
    """A call failed. Subclasses tell the kinds of failure apart."""

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
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.reason = reason  # the server's word for it, in UPPER_SNAKE_CASE; None when the server did not speak
        self.retry_after = retry_after  # seconds
        self.request_id = request_id
        self.violations = violations


class InvalidRequest(Llama2Error):
    """The request breaks a rule of the contract or of the model card; `violations` names every field at fault."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT


class Unauthenticated(Llama2Error):
    """The API key is missing, unknown or revoked."""

    default_code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(Llama2Error):
    """The account is known and may not call this service."""

    default_code = grpc.StatusCode.PERMISSION_DENIED


class ResourceExhausted(Llama2Error):
    """Too much was asked for; the subclasses say of what, when the server does."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class QuotaExceeded(ResourceExhausted):
    """The account has used up its requests per minute; `retry_after` is the exact next time."""


class QueueFull(ResourceExhausted):
    """The waiting line is full, or longer than the call's deadline; retry later."""


class Unavailable(Llama2Error):
    """The server is not reachable, still loading, or draining."""

    default_code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(Llama2Error):
    """The call's deadline passed before its end."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


class InternalError(Llama2Error):
    """The server failed; `request_id` finds the cause in its logs."""

    default_code = grpc.StatusCode.INTERNAL


class Unimplemented(Llama2Error):
    """The server does not know this method: it is older than this client, or another service."""

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
        InternalError,
        Unimplemented,
    )
}


@contextlib.contextmanager
def mapped() -> Iterator[None]:
    """Turn gRPC's error into ours: the one seam at which they meet."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


def from_rpc_error(error: grpc.aio.AioRpcError) -> Llama2Error:
    """Read the code and, where the server sent them, the rich details."""
    status = _status_details(error)
    info = _detail(status, error_details_pb2.ErrorInfo)
    retry = _detail(status, error_details_pb2.RetryInfo)
    request = _detail(status, error_details_pb2.RequestInfo)
    bad_request = _detail(status, error_details_pb2.BadRequest)

    kind = _BY_CODE.get(error.code(), Llama2Error)
    if kind is ResourceExhausted:
        if _detail(status, error_details_pb2.QuotaFailure) is not None:
            kind = QuotaExceeded
        elif retry is not None:
            kind = QueueFull
    return kind(
        error.details() or error.code().name,
        code=error.code(),
        reason=info.reason if info else None,
        retry_after=retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9 if retry else None,
        request_id=request.request_id if request else None,
        violations=tuple(Violation(v.field, v.description) for v in bad_request.field_violations)
        if bad_request
        else (),
    )


def _status_details(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """The google.rpc.Status of the trailers; an empty one where there is none, or what is there is not one."""
    trailers = error.trailing_metadata() or ()
    for key, value in trailers:
        if key == STATUS_DETAILS_TRAILER and isinstance(value, bytes):
            with contextlib.suppress(DecodeError):
                return status_pb2.Status.FromString(value)
    return status_pb2.Status()


def _detail(status: status_pb2.Status, kind: type[_Detail]) -> _Detail | None:
    """The first detail of this kind, if there is one."""
    for packed in status.details:
        detail = kind()
        with contextlib.suppress(DecodeError):
            if packed.Unpack(detail):
                return detail
    return None
