"""Every way that this service refuses a call; each class carries its gRPC status code and its rich details.

    ServiceError
    |-- InvalidRequest      INVALID_ARGUMENT      the request breaks a rule; lists every violation
    |-- Unauthenticated     UNAUTHENTICATED       no key, or not a valid one: one message for all
    |-- AccountDisabled     PERMISSION_DENIED     the key is good, and its account may not call
    |-- ResourceExhausted   RESOURCE_EXHAUSTED
    |   |-- QuotaExceeded                         the account's requests per minute are used up
    |   |-- QueueFull                              no place in the waiting line
    |   `-- QueueWaitTooLong                           the wait would outlast the deadline or the line's limit
    |-- Unavailable         UNAVAILABLE
    |   |-- ShuttingDown                              the server is shutting down
    |   |-- QuotaStoreUnavailable                        quotas cannot be counted
    |   |-- UsageJournalFull                            usage cannot be recorded
    |   |-- UsageUnavailable                            usage cannot be read
    |   `-- EngineUnavailable                            the engine has stopped
    |-- DeadlineExceeded    DEADLINE_EXCEEDED     the call's deadline passed in the line
    `-- InternalError       INTERNAL              a fault of the server

`ServiceError.to_status` makes the status and the trailers that go on the wire; `interceptor.py` is the one place that
sends it.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

ERROR_DOMAIN = "llama2.v1"
# gRPC peers accept 8 KB of metadata by default; a status in base64 and the message stay under half of it.
MAX_VIOLATIONS_BYTES = 1800


class Violation(NamedTuple):
    """One broken rule: the field's path, such as `messages[1].content`, and what is allowed, in plain words."""

    field: str
    description: str


class ServiceError(Exception):
    """A refusal; `str(error)` is the message for the caller and must never hold text of the request."""

    code: ClassVar[grpc.StatusCode]
    reason: ClassVar[str]
    retry_after_seconds: float | None = None

    def details(self) -> list[Message]:
        """The google.rpc details beside ErrorInfo, RetryInfo and RequestInfo."""
        return []

    def to_status(self, request_id: str) -> tuple[str, list[tuple[str, str | bytes]]]:
        """The status message and the trailing metadata that carry this error."""
        status = status_pb2.Status(code=self.code.value[0], message=str(self))
        trailers: list[tuple[str, str | bytes]] = []
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=self.reason, domain=ERROR_DOMAIN))
        for detail in self.details():
            status.details.add().Pack(detail)
        if self.retry_after_seconds is not None:
            milliseconds = max(1, math.ceil(self.retry_after_seconds * 1000))
            delay = Duration(seconds=milliseconds // 1000, nanos=milliseconds % 1000 * 1_000_000)
            status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
            trailers.append(("grpc-retry-pushback-ms", str(milliseconds)))
        status.details.add().Pack(error_details_pb2.RequestInfo(request_id=request_id))
        trailers.append(("grpc-status-details-bin", status.SerializeToString()))
        return str(self), trailers


class InvalidRequest(ServiceError):
    """The request breaks at least one rule; nothing of it was run."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        field, description = self.violations[0]
        more = f" (and {len(self.violations) - 1} more)" if len(self.violations) > 1 else ""
        super().__init__(f"{field}: {description}{more}" if field else f"{description}{more}")

    def details(self) -> list[Message]:
        """One BadRequest; violations that do not fit the trailers are counted in a last entry."""
        bad_request = error_details_pb2.BadRequest()
        for count, (field, description) in enumerate(self.violations):
            if bad_request.ByteSize() + len(field) + len(description.encode()) > MAX_VIOLATIONS_BYTES:
                rest = f"{len(self.violations) - count} more violations are not listed"
                bad_request.field_violations.add(field="", description=rest)
                break
            bad_request.field_violations.add(field=field, description=description)
        return [bad_request]


class Unauthenticated(ServiceError):
    """No key, an unknown or a revoked one: one message for all, so that nobody learns which keys exist."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"

    def __init__(self) -> None:
        super().__init__("a valid API key is needed, as metadata: authorization: Bearer KEY")


class AccountDisabled(ServiceError):
    """The key is known, and its account is disabled."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "ACCOUNT_DISABLED"

    def __init__(self) -> None:
        super().__init__("this account is disabled; ask the operator")


class ResourceExhausted(ServiceError):
    """There is no room for the call now; it may be tried again after `retry_after_seconds`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class QuotaExceeded(ResourceExhausted):
    """The account has used up its requests per minute; `retry_after_seconds` is exact."""

    reason = "QUOTA_EXCEEDED"

    def __init__(self, account: str, requests_per_minute: int, retry_after_seconds: float) -> None:
        super().__init__(
            f"{requests_per_minute} requests a minute for account {account} are used up", retry_after_seconds
        )
        self._account = account

    def details(self) -> list[Message]:
        """One QuotaFailure that names the account."""
        violation = error_details_pb2.QuotaFailure.Violation(subject=f"account:{self._account}", description=str(self))
        return [error_details_pb2.QuotaFailure(violations=[violation])]


class QueueFull(ResourceExhausted):
    """The waiting line is full; retry later."""

    reason = "QUEUE_FULL"


class QueueWaitTooLong(ResourceExhausted):
    """The wait for a slot would outlast the call's deadline or the line's limit."""

    reason = "QUEUE_WAIT_TOO_LONG"


class Unavailable(ServiceError):
    """This server cannot take calls now; another one, or this one a little later, can."""

    code = grpc.StatusCode.UNAVAILABLE
    retry_after_seconds = 1.0


class ShuttingDown(Unavailable):
    """The server is shutting down."""

    reason = "SHUTTING_DOWN"


class QuotaStoreUnavailable(Unavailable):
    """The store of the quotas does not answer, and the operator chose to refuse rather than to guess."""

    reason = "QUOTA_STORE_UNAVAILABLE"


class UsageJournalFull(Unavailable):
    """The ledger's store is down and its journal is full: work would go unrecorded."""

    reason = "USAGE_JOURNAL_FULL"


class UsageUnavailable(Unavailable):
    """The ledger's store does not answer, so that usage cannot be read now."""

    reason = "USAGE_UNAVAILABLE"

    def __init__(self) -> None:
        super().__init__("usage cannot be read now; try again")


class EngineUnavailable(Unavailable):
    """The engine has stopped; nothing can be generated here."""

    reason = "ENGINE_UNAVAILABLE"


class DeadlineExceeded(ServiceError):
    """The call's deadline passed before its work was done."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class InternalError(ServiceError):
    """A fault of the server; the cause is in its log under the request id, and never in the message."""

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"

    def __init__(self) -> None:
        super().__init__("the server failed; report the request id to its operator")
