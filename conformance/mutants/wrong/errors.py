"""Mutants that change errors."""

import re

from google.rpc import error_details_pb2

from conformance.mutants.behavior import Call, Failure, on_error

INVALID = "INVALID_ARGUMENT"


def _is_violation(failure: Failure) -> bool:
    return failure.reason == "INVALID_REQUEST"


@on_error("Generate")
def no_bad_request(call: Call, failure: Failure) -> None:
    """Lists no violations of sampling parameters."""
    if _is_violation(failure) and "top_" in failure.message:
        failure.drop_details("BadRequest")


@on_error()
def no_request_info(call: Call, failure: Failure) -> None:
    """Sends no RequestInfo."""
    failure.drop_details("RequestInfo")


@on_error()
def another_domain(call: Call, failure: Failure) -> None:
    """Sends another domain."""
    failure.change_detail(error_details_pb2.ErrorInfo, lambda info: info.ClearField("domain"))


@on_error()
def no_id_in_request_info(call: Call, failure: Failure) -> None:
    """Sends RequestInfo without an id."""
    failure.change_detail(error_details_pb2.RequestInfo, lambda info: info.ClearField("request_id"))


@on_error()
def details_without_message(call: Call, failure: Failure) -> None:
    """Sends details without a message."""
    status = failure.status
    status.message = ""
    failure.status = status


@on_error()
def no_numbers_in_messages(call: Call, failure: Failure) -> None:
    """States no numbers in error messages."""
    failure.message = re.sub(r"\d", "", failure.message)


@on_error()
def does_not_name_the_rpc(call: Call, failure: Failure) -> None:
    """Does not name the RPC to call."""
    failure.message = failure.message.replace("GenerateStream", "another method").replace("Generate ", "another ")


@on_error()
def quotes_request(call: Call, failure: Failure) -> None:
    """Quotes the request in the error."""
    if _is_violation(failure) and call.request is not None:
        failure.message += str(call.request)[:60].replace("\n", " ")


@on_error()
def large_trailers(call: Call, failure: Failure) -> None:
    """Lists violations without a limit."""
    if "more" in failure.message:
        failure.trailers.append(("grpc-status-details-bin-more", "x"))
        status = failure.status
        status.message += "x" * 4000
        failure.status = status


@on_error()
def hides_omitted_violations(call: Call, failure: Failure) -> None:
    """Does not count the violations that are not listed."""
    failure.message = failure.message.partition(" (and ")[0]


@on_error()
def first_violation_only(call: Call, failure: Failure) -> None:
    """Lists only the first violation."""

    def cut(bad_request: error_details_pb2.BadRequest) -> None:
        del bad_request.field_violations[1:]

    failure.change_detail(error_details_pb2.BadRequest, cut)


@on_error()
def dotted_field_paths(call: Call, failure: Failure) -> None:
    """Sends field paths with dots instead of brackets."""

    def change(bad_request: error_details_pb2.BadRequest) -> None:
        for violation in bad_request.field_violations:
            violation.field = re.sub(r"\[(\d+)\]", r".\1", violation.field)

    if "12" in failure.message or "stop" in failure.message:
        failure.change_detail(error_details_pb2.BadRequest, change)


@on_error()
def index_from_one(call: Call, failure: Failure) -> None:
    """Counts messages from 1 in field paths."""

    def change(bad_request: error_details_pb2.BadRequest) -> None:
        for violation in bad_request.field_violations:
            violation.field = re.sub(r"\[(\d+)\]", lambda found: f"[{int(found[1]) + 1}]", violation.field)

    if "role" in failure.message:
        failure.change_detail(error_details_pb2.BadRequest, change)


@on_error("GenerateStream")
def stream_errors_without_details(call: Call, failure: Failure) -> None:
    """Streams fail without details."""
    failure.trailers = []


@on_error("CountTokens")
def count_errors_without_details(call: Call, failure: Failure) -> None:
    """CountTokens fails without details."""
    failure.trailers = []


@on_error("GetUsage")
def usage_errors_are_internal(call: Call, failure: Failure) -> None:
    """GetUsage fails with INTERNAL for a wrong date."""
    if failure.code == INVALID:
        failure.code = "INTERNAL"


@on_error()
def malformed_is_unknown(call: Call, failure: Failure) -> None:
    """A malformed message is UNKNOWN, as by default in gRPC for Python."""
    if "protobuf" in failure.message:
        failure.code, failure.trailers = "UNKNOWN", []


@on_error()
def too_large_is_exhausted(call: Call, failure: Failure) -> None:
    """A message that is too large is RESOURCE_EXHAUSTED."""
    if failure.reason == "REQUEST_TOO_LARGE":
        failure.code = "RESOURCE_EXHAUSTED"


@on_error()
def far_too_large_is_internal(call: Call, failure: Failure) -> None:
    """A message beyond the limit of gRPC is INTERNAL."""
    if failure.code == "RESOURCE_EXHAUSTED" and not failure.trailers:
        failure.code = "INTERNAL"


@on_error()
def unknown_method_is_not_found(call: Call, failure: Failure) -> None:
    """An unknown method is NOT_FOUND."""
    if failure.code == "UNIMPLEMENTED":
        failure.code = "NOT_FOUND"


@on_error()
def disabled_is_unauthenticated(call: Call, failure: Failure) -> None:
    """A disabled account is UNAUTHENTICATED."""
    if failure.code == "PERMISSION_DENIED":
        failure.code = "UNAUTHENTICATED"


@on_error()
def reveals_unknown_keys(call: Call, failure: Failure) -> None:
    """An unknown key has another message than a missing one."""
    if failure.code == "UNAUTHENTICATED" and call.role == "unknown":
        failure.message = "the API key is unknown"


@on_error()
def quota_without_quota_failure(call: Call, failure: Failure) -> None:
    """Sends no QuotaFailure."""
    failure.drop_details("QuotaFailure")


@on_error()
def quota_delay_is_a_second(call: Call, failure: Failure) -> None:
    """Tells clients to retry after a second."""

    def change(info: error_details_pb2.RetryInfo) -> None:
        info.retry_delay.FromMilliseconds(1000)

    if failure.reason == "QUOTA_EXCEEDED":
        failure.change_detail(error_details_pb2.RetryInfo, change)


@on_error()
def pushback_ignores_deadline(call: Call, failure: Failure) -> None:
    """Sends the delay as pushback although it exceeds the deadline."""
    failure.trailers = [(key, "60000" if value == "-1" else value) for key, value in failure.trailers]


@on_error()
def quota_is_queue_full(call: Call, failure: Failure) -> None:
    """A used up quota has the reason of a full queue."""
    if failure.reason == "QUOTA_EXCEEDED":
        failure.change_detail(error_details_pb2.ErrorInfo, lambda info: setattr(info, "reason", "QUEUE_FULL"))


@on_error()
def queue_full_is_unavailable(call: Call, failure: Failure) -> None:
    """A full queue is UNAVAILABLE."""
    if failure.reason == "QUEUE_FULL":
        failure.code = "UNAVAILABLE"


@on_error()
def queue_full_without_delay(call: Call, failure: Failure) -> None:
    """A full queue has no RetryInfo."""
    if failure.reason == "QUEUE_FULL":
        failure.drop_details("RetryInfo")
