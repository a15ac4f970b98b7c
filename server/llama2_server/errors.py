"""Errors of calls. Each class has its gRPC status code, its reason and its details.

    ServiceError
    |-- InvalidRequest             INVALID_ARGUMENT
    |   |-- RequestTooLarge
    |   |-- UnknownModel
    |   `-- IdempotencyKeyReused
    |-- Unauthenticated            UNAUTHENTICATED
    |-- AccountDisabled            PERMISSION_DENIED
    |-- ResourceExhausted          RESOURCE_EXHAUSTED
    |   |-- QuotaExceeded
    |   |-- BudgetExhausted
    |   |-- QueueFull
    |   |-- QueueWaitTooLong
    |   `-- TooManyRequests
    |-- Unavailable                UNAVAILABLE
    |   |-- ShuttingDown
    |   |-- QuotaStoreUnavailable
    |   |-- UsageUnavailable
    |   |-- EngineUnavailable
    |   `-- FingerprintPending
    |-- FailedPrecondition         FAILED_PRECONDITION
    |   |-- IdempotencyKeyUnknown
    |   `-- FingerprintChanged
    |-- DeadlineExceeded           DEADLINE_EXCEEDED
    `-- InternalError              INTERNAL

The first line of each docstring is the meaning of the reason in docs/api.md. `ServiceError.to_status` builds the status
and the trailers; only `api/interceptor.py` sends them.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

ERROR_DOMAIN = "llama2.v1"
TYPE_URL = "type.googleapis.com"
# gRPC peers accept 8 KB of metadata by default; a status in base64 and the message stay under half of it.
MAX_VIOLATIONS_BYTES = 1800
# No call sleeps for longer. The clients also read the pushback as a 32-bit number of milliseconds, which is 24 days.
MAX_PUSHBACK_SECONDS = 3600.0


class Violation(NamedTuple):
    """A violated rule: the field's path, such as `messages[1].content`, and the allowed values in plain words."""

    field: str
    description: str


class ServiceError(Exception):
    """Base of all errors of calls; `str(error)` is sent to the client and must never contain text of the request."""

    code: ClassVar[grpc.StatusCode]
    reason: ClassVar[str]
    retry_after_seconds: float | None = None
    refunds_quota: bool = False
    """Whether the call gets its quota back: the server ended it before its first prefill step, for lack of capacity."""

    def details(self) -> list[Message]:
        """Return the google.rpc details in addition to ErrorInfo, RetryInfo and RequestInfo."""
        return []

    def to_status(
        self, request_id: str, remaining_seconds: float | None = None
    ) -> tuple[str, list[tuple[str, str | bytes]]]:
        """Return the status message and the trailing metadata of this error.

        `remaining_seconds` is the time until the call's deadline; None without one. If the wait exceeds it, or an hour,
        the pushback is -1 (do not retry): gRPC clients sleep for the pushback before they return the error, and would
        return DEADLINE_EXCEEDED without details in its place.
        """
        status = status_pb2.Status(code=self.code.value[0], message=str(self))
        trailers: list[tuple[str, str | bytes]] = []
        details: list[Message] = [error_details_pb2.ErrorInfo(reason=self.reason, domain=ERROR_DOMAIN), *self.details()]
        if self.retry_after_seconds is not None:
            milliseconds = max(1, math.ceil(self.retry_after_seconds * 1000))
            delay = Duration(seconds=milliseconds // 1000, nanos=milliseconds % 1000 * 1_000_000)
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
            limit_seconds = MAX_PUSHBACK_SECONDS if remaining_seconds is None else remaining_seconds
            in_time = milliseconds <= min(limit_seconds, MAX_PUSHBACK_SECONDS) * 1000
            trailers.append(("grpc-retry-pushback-ms", str(milliseconds if in_time else -1)))
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
        for detail in details:  # `Pack` takes twice as long
            status.details.add(type_url=f"{TYPE_URL}/{detail.DESCRIPTOR.full_name}", value=detail.SerializeToString())
        trailers.append(("grpc-status-details-bin", status.SerializeToString()))
        return str(self), trailers


class InvalidRequest(ServiceError):
    """The request violates at least one rule; BadRequest lists the violations."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[Violation], *, complete: bool = True) -> None:
        """Set `complete` to False if validation stopped and the request can have further violations."""
        self.violations = tuple(violations)
        self._complete = complete
        field, description = self.violations[0]
        others = f"{len(self.violations) - 1}" if complete else f"at least {len(self.violations)}"
        more = "" if others == "0" else f" (and {others} more)"
        super().__init__(f"{field}: {description}{more}" if field else f"{description}{more}")

    def details(self) -> list[Message]:
        """Return one BadRequest; its last entry counts the violations that it does not list."""
        bad_request = error_details_pb2.BadRequest()
        for field, description in self.violations:
            if bad_request.ByteSize() + len(field) + len(description.encode()) > MAX_VIOLATIONS_BYTES:
                break
            bad_request.field_violations.add(field=field, description=description)
        if rest := self.unlisted(len(bad_request.field_violations)):
            bad_request.field_violations.add(field="", description=rest)
        return [bad_request]

    def unlisted(self, listed: int) -> str:
        """Return a sentence about the violations that follow the first ones; empty if there are none."""
        count = len(self.violations) - listed
        if not self._complete:
            number = f"at least {count + 1} more" if count else "further"
            return f"{number} violations are not listed"
        return f"{count} more violations are not listed" if count else ""


class RequestTooLarge(InvalidRequest):
    """The request message has more bytes than the server accepts."""

    reason = "REQUEST_TOO_LARGE"

    def __init__(self, size: int, limit: int) -> None:
        message = f"the request message has {size} bytes; at most {limit} are allowed: send a shorter request"
        super().__init__([Violation("", message)])


class UnknownModel(InvalidRequest):
    """The URL of the hosted endpoint names a model that this server does not serve."""

    reason = "UNKNOWN_MODEL"

    def __init__(self, served: str) -> None:
        super().__init__([Violation("model", f"this server does not serve the model in the URL; it serves {served}")])


class IdempotencyKeyReused(InvalidRequest):
    """Another request of the account has the same idempotency key."""

    reason = "IDEMPOTENCY_KEY_REUSED"

    def __init__(self, field: str) -> None:
        message = "differs from the request that used this idempotency_key first; use a new key for a new request"
        super().__init__([Violation(field, message)])


class Unauthenticated(ServiceError):
    """The call does not have exactly one valid API key.

    Missing, unknown and revoked keys get the same message, which therefore does not reveal the existing keys.
    """

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"

    def __init__(
        self, message: str = "a valid API key is required; send it as metadata: authorization: Bearer KEY"
    ) -> None:
        super().__init__(message)


class AccountDisabled(ServiceError):
    """The account of the API key is disabled."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "ACCOUNT_DISABLED"

    def __init__(self) -> None:
        super().__init__("the account is disabled; ask the operator")


class ResourceExhausted(ServiceError):
    """The call cannot be accepted now; the client may retry after `retry_after_seconds`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    keeps_order: bool = False
    """Whether the call, if it returns at its retry time, has the order in the queue that it had at the rejection."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds

    def retry_after(self, seconds: float) -> Self:
        """Return a copy of the error with this retry time, because several calls can share an error."""
        error = type(self).__new__(type(self), *self.args)
        error.__dict__.update(self.__dict__, retry_after_seconds=seconds)
        return error


def _quota_failure(account_id: str, description: str) -> error_details_pb2.QuotaFailure:
    violation = error_details_pb2.QuotaFailure.Violation(subject=f"account:{account_id}", description=description)
    return error_details_pb2.QuotaFailure(violations=[violation])


class QuotaExceeded(ResourceExhausted):
    """The account has used up its requests per minute."""

    reason = "QUOTA_EXCEEDED"

    def __init__(self, account_id: str, requests_per_minute: int, retry_after_seconds: float) -> None:
        message = f"account {account_id} has used up its quota of {requests_per_minute} requests per minute"
        super().__init__(message, retry_after_seconds)
        self._account_id = account_id

    def details(self) -> list[Message]:
        """Return one QuotaFailure that names the account."""
        return [_quota_failure(self._account_id, str(self))]


class BudgetExhausted(ResourceExhausted):
    """The highest price of the request does not fit into the account's neuron budget for the month."""

    reason = "BUDGET_EXHAUSTED"
    refunds_quota = True

    def __init__(self, account_id: str, message: str, retry_after_seconds: float) -> None:
        super().__init__(message, retry_after_seconds)
        self._account_id = account_id

    def details(self) -> list[Message]:
        """Return one QuotaFailure that names the account."""
        return [_quota_failure(self._account_id, str(self))]


class QueueFull(ResourceExhausted):
    """The request queue is full, or a request of an account with fewer requests in the full queue came."""

    reason = "QUEUE_FULL"
    refunds_quota = True

    def __init__(self, message: str, retry_after_seconds: float, *, displaced: bool = False) -> None:
        super().__init__(message, retry_after_seconds)
        self.keeps_order = not displaced


class QueueWaitTooLong(ResourceExhausted):
    """The wait for a slot exceeds the call's deadline or the queue timeout."""

    reason = "QUEUE_WAIT_TOO_LONG"
    refunds_quota = True
    keeps_order = True


class TooManyRequests(ResourceExhausted):
    """Too many calls that generate nothing, by the account or by callers without a valid API key."""

    reason = "TOO_MANY_REQUESTS"


class Unavailable(ServiceError):
    """This server cannot accept calls now; the client may retry, on any server."""

    code = grpc.StatusCode.UNAVAILABLE
    retry_after_seconds = 1.0


class ShuttingDown(Unavailable):
    """The server is shutting down."""

    reason = "SHUTTING_DOWN"

    def __init__(self, message: str, *, refunds_quota: bool = False) -> None:
        super().__init__(message)
        self.refunds_quota = refunds_quota


class QuotaStoreUnavailable(Unavailable):
    """The quota store does not answer, and `--quota-fallback` is `reject`."""

    reason = "QUOTA_STORE_UNAVAILABLE"


class UsageUnavailable(Unavailable):
    """Usage cannot be recorded or read: the disk is full, or the usage store does not answer."""

    reason = "USAGE_UNAVAILABLE"
    refunds_quota = True


class EngineUnavailable(Unavailable):
    """The engine has stopped; this server cannot generate."""

    reason = "ENGINE_UNAVAILABLE"


class FingerprintPending(Unavailable):
    """The reply must be computed again, and this server still hashes its weights to learn whether it can do so."""

    reason = "FINGERPRINT_PENDING"

    def __init__(self) -> None:
        super().__init__("this server still hashes its weights, and cannot yet compute the reply again; retry")


class FailedPrecondition(ServiceError):
    """The reply of an idempotency key cannot be sent again; the client needs a new key."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class IdempotencyKeyUnknown(FailedPrecondition):
    """The call resumes a stream, but its idempotency key is unknown or expired."""

    reason = "IDEMPOTENCY_KEY_UNKNOWN"

    def __init__(self) -> None:
        super().__init__("the idempotency_key is unknown or expired; use a new key, without resume_after_characters")


class FingerprintChanged(FailedPrecondition):
    """The reply was generated by another model or other kernels, so that this server would compute another text."""

    reason = "FINGERPRINT_CHANGED"

    def __init__(self) -> None:
        super().__init__("this server cannot compute the reply of the idempotency_key again; use a new key")


class DeadlineExceeded(ServiceError):
    """The call's deadline passed before it was complete."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class InternalError(ServiceError):
    """The server failed; only its log has the cause, under the request id."""

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"

    def __init__(self) -> None:
        super().__init__("internal error; report the request id to the operator")
