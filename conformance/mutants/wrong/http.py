"""Mutants of JSON over HTTP."""

import json
import re

from conformance.mutants.behavior import Exchange, on_http, on_http_response

GENERATE = "/v1/generate"


def _answer(exchange: Exchange, status: int, body: str = "{}") -> None:
    exchange.status, exchange.response_body = status, body
    exchange.response_headers = {"content-type": "application/json"}


def _reject(exchange: Exchange) -> None:
    _answer(exchange, 400, json.dumps({"code": 3, "message": "rejected", "details": []}))


def _is_event_stream(exchange: Exchange) -> bool:
    return exchange.response_headers.get("content-type") == "text/event-stream"


@on_http
def rejects_null(exchange: Exchange) -> None:
    """Rejects null."""
    if ": null" in exchange.body:
        _reject(exchange)


@on_http
def rejects_quoted_numbers(exchange: Exchange) -> None:
    """Rejects numbers in quotes."""
    if re.search(r'"max_tokens": "\d|"seed":"', exchange.body):
        _reject(exchange)


@on_http
def rejects_empty_messages(exchange: Exchange) -> None:
    """Rejects an empty list of messages next to a prompt."""
    if '"messages": []' in exchange.body:
        _reject(exchange)


@on_http
def drops_wrong_types(exchange: Exchange) -> None:
    """Ignores values of a wrong type."""
    exchange.body = exchange.body.replace('"hot"', "1").replace('"many"', "1")


@on_http
def replaces_surrogates(exchange: Exchange) -> None:
    """Replaces lone surrogates."""
    exchange.body = exchange.body.replace("\\ud800", "?")


@on_http
def rejects_messages(exchange: Exchange) -> None:
    """Rejects messages."""
    if '"messages": [{' in exchange.body:
        _reject(exchange)


@on_http
def never_streams(exchange: Exchange) -> None:
    """Ignores `stream`."""
    exchange.body = exchange.body.replace('"stream": true', '"stream": false')


@on_http
def accepts_other_content_types(exchange: Exchange) -> None:
    """Accepts text as JSON."""
    exchange.headers["content-type"] = "application/json"


@on_http
def accepts_get(exchange: Exchange) -> None:
    """Accepts GET."""
    if exchange.method == "GET":
        _answer(exchange, 200)


@on_http
def only_one_path(exchange: Exchange) -> None:
    """Serves only one path."""
    if exchange.path.startswith("/llama2"):
        _answer(exchange, 404, json.dumps({"code": 12, "message": "unknown path", "details": []}))


@on_http
def every_path(exchange: Exchange) -> None:
    """Serves every path."""
    exchange.path = GENERATE if exchange.path.startswith("/v1") else exchange.path


@on_http_response
def wraps_reply(exchange: Exchange) -> None:
    """Wraps the reply in another object."""
    if exchange.status == 200 and not _is_event_stream(exchange) and exchange.path == GENERATE:
        exchange.response_body = json.dumps({"result": json.loads(exchange.response_body)})


@on_http_response
def events_without_prefix(exchange: Exchange) -> None:
    """Sends JSON lines instead of events."""
    if _is_event_stream(exchange):
        exchange.response_body = exchange.response_body.replace("data: ", "")


@on_http_response
def one_event(exchange: Exchange) -> None:
    """Sends the whole reply in one event."""
    if _is_event_stream(exchange):
        events = [json.loads(line[6:]) for line in exchange.response_body.split("\n") if line]
        whole = events[-1] | {"response": "".join(event["response"] for event in events)}
        exchange.response_body = f"data: {json.dumps(whole)}\n\n"


@on_http_response
def events_have_another_type(exchange: Exchange) -> None:
    """Sends events as plain text."""
    if _is_event_stream(exchange):
        exchange.response_headers["content-type"] = "text/plain"


@on_http_response
def seed_is_number(exchange: Exchange) -> None:
    """Prints 64-bit numbers as numbers."""
    exchange.response_body = re.sub(r'"seed": ?"(\d+)"', r'"seed":\1', exchange.response_body)


@on_http_response
def price_is_number(exchange: Exchange) -> None:
    """Prints the price as a number."""
    exchange.response_body = re.sub(r'"neurons": ?"([\d.]+)"', r'"neurons":\1', exchange.response_body)


@on_http_response
def omits_zero_values(exchange: Exchange) -> None:
    """Omits empty text, 0 and false."""
    exchange.response_body = re.sub(r'"(response|cached)": ?(""|false),?', "", exchange.response_body)


@on_http_response
def violations_are_422(exchange: Exchange) -> None:
    """Answers violations with 422."""
    exchange.status = 422 if exchange.status == 400 else exchange.status


@on_http_response
def stream_errors_are_200(exchange: Exchange) -> None:
    """Answers errors of streams with 200."""
    if '"stream": true' in exchange.body and exchange.status == 400:
        exchange.status = 200


@on_http_response
def quotes_body(exchange: Exchange) -> None:
    """Quotes the body in an error."""
    if exchange.status == 400 and "sesame" in exchange.body:
        document = json.loads(exchange.response_body)
        exchange.response_body = json.dumps(document | {"message": f"cannot parse {exchange.body}"})


@on_http_response
def errors_without_fields(exchange: Exchange) -> None:
    """Names no fields in errors."""
    if exchange.status == 400:
        exchange.response_body = re.sub(r'"field": ?"[^"]*"', '"field":""', exchange.response_body)


@on_http_response
def no_key_is_403(exchange: Exchange) -> None:
    """Answers a missing key with 403."""
    exchange.status = 403 if exchange.status == 401 else exchange.status


@on_http_response
def disabled_is_401(exchange: Exchange) -> None:
    """Answers a disabled account with 401."""
    exchange.status = 401 if exchange.status == 403 else exchange.status


@on_http_response
def no_retry_after(exchange: Exchange) -> None:
    """Sends no Retry-After."""
    exchange.response_headers.pop("retry-after", None)


@on_http_response
def get_without_allow(exchange: Exchange) -> None:
    """Sends no Allow with 405."""
    exchange.response_headers.pop("allow", None)
