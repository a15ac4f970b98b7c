"""The host's output format: the JSON envelope of results and errors, and server-sent events.

All JSON is ASCII. Clients split events into lines, some of them also at characters such as U+2028, and gRPC's trailers
accept only ASCII.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from llama2_server.errors import (
    AccountDisabled,
    BudgetExhausted,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    QuotaExceeded,
    RequestTooLarge,
    ResourceExhausted,
    ServiceError,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)
from llama2_server.generation.reply import ReplyStats

JSON_TYPE = "application/json"
EVENTS_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"
STATUS_TRAILER = "llama2-http-status"
BODY_TRAILER = "llama2-http-body"
# All trailers of an error stay under 4 KB; the status with its details takes up to 2.6 KB.
MAX_ERRORS_BYTES = 700


class HttpError(NamedTuple):
    """The HTTP status of an error, and its code in the envelope. Codes of 1000 and more are the host's."""

    status: int
    code: int


# An error has the entry of its own class, or of the nearest base class. docs/hosted-endpoint.md has the same table.
HTTP_ERRORS: dict[type[ServiceError], HttpError] = {
    InvalidRequest: HttpError(400, 3003),
    UnknownModel: HttpError(400, 5007),
    RequestTooLarge: HttpError(413, 3006),
    Unauthenticated: HttpError(401, 10000),
    AccountDisabled: HttpError(403, 3023),
    QuotaExceeded: HttpError(429, 3036),
    BudgetExhausted: HttpError(429, 3036),
    ResourceExhausted: HttpError(429, 3040),
    DeadlineExceeded: HttpError(408, 3007),
    FailedPrecondition: HttpError(409, 409),
    Unavailable: HttpError(503, 503),
    InternalError: HttpError(500, 500),
}


def usage_object(stats: ReplyStats) -> dict[str, int]:
    """Return the token counts of a reply under the host's names."""
    return {
        "prompt_tokens": stats.tokens.input_tokens,
        "completion_tokens": stats.tokens.output_tokens,
        "total_tokens": stats.tokens.input_tokens + stats.tokens.output_tokens,
    }


def result_body(text: str, stats: ReplyStats) -> bytes:
    """Return the body of a complete reply."""
    result = {"response": text, "usage": usage_object(stats)}
    return json.dumps({"result": result, "success": True, "errors": [], "messages": []}).encode()


def event(data: dict[str, Any]) -> bytes:
    """Return one server-sent event, which is one `data:` line and an empty line."""
    return f"data: {json.dumps(data)}\n\n".encode()


def error_object(error: ServiceError) -> dict[str, Any]:
    """Return the envelope of an error."""
    code = http_error(error).code
    errors = [{"code": code, "message": message} for message in _messages(error)]
    return {"result": None, "success": False, "errors": errors, "messages": []}


def error_trailers(error: ServiceError) -> list[tuple[str, str | bytes]]:
    """Return the trailers from which the gateway makes the HTTP response of an error."""
    status = str(http_error(error).status)
    return [(STATUS_TRAILER, status), (BODY_TRAILER, json.dumps(error_object(error)))]


def http_error(error: ServiceError) -> HttpError:
    """Return the HTTP status and the code of an error."""
    return next(HTTP_ERRORS[base] for base in type(error).__mro__ if base in HTTP_ERRORS)


def _messages(error: ServiceError) -> Iterator[str]:
    """Yield one message per violation, such as `messages[0].content: is required`, or the message of another error."""
    if not isinstance(error, InvalidRequest):
        yield str(error)
        return
    size, listed = 0, len(error.violations)
    for count, (field, description) in enumerate(error.violations):
        message = f"{field}: {description}" if field else description
        size += len(json.dumps(message)) + len('{"code": 3003, "message": }, ')
        if count and size > MAX_ERRORS_BYTES:
            listed = count
            break
        yield message
    if rest := error.unlisted(listed):
        yield rest
