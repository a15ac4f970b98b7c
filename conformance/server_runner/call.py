"""Make the calls of a step."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf import symbol_database
from google.protobuf.json_format import MessageToDict, Parse, ParseDict
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from conformance.server_runner.outcome import Outcome, events
from conformance.server_runner.target import Target
from conformance.v1 import conformance_pb2 as pb
from llama2.v1 import account_pb2, model_pb2, text_generation_pb2

DEFAULT_DEADLINE_MS = 20_000
TEXT_GENERATION = "/llama2.v1.TextGenerationService"
# Their types are found by name, so the modules must be imported.
IMPORTED = (health_pb2, reflection_pb2, error_details_pb2)
METHODS: dict[str, tuple[str, type[Message]]] = {
    "generate": (f"{TEXT_GENERATION}/Generate", text_generation_pb2.GenerateResponse),
    "generate_stream": (f"{TEXT_GENERATION}/GenerateStream", text_generation_pb2.GenerateStreamResponse),
    "count_tokens": (f"{TEXT_GENERATION}/CountTokens", text_generation_pb2.CountTokensResponse),
    "get_model_card": ("/llama2.v1.ModelService/GetModelCard", model_pb2.GetModelCardResponse),
    "get_usage": ("/llama2.v1.AccountService/GetUsage", account_pb2.GetUsageResponse),
}


async def make_call(target: Target, step: pb.Step, key: str | None, on_first: Callable[[], None]) -> Outcome:
    """Make one call and return its result; `on_first` is called at the first message, or at the end."""
    try:
        if step.WhichOneof("call") == "http_call":
            return await _http(target, step, key, on_first)
        return await _grpc(target, step, key, on_first)
    finally:
        on_first()


def _request(step: pb.Step) -> tuple[str, bytes, type[Message] | None]:
    """Return the path, the bytes of the request and the type of the responses."""
    kind = step.WhichOneof("call")
    if kind == "raw_call":
        raw = step.raw_call
        data = bytes.fromhex(raw.hex)
        if raw.request_type:
            data = ParseDict(MessageToDict(raw.json), _type(raw.request_type)()).SerializeToString()
        return raw.method, data, _type(raw.response_type) if raw.response_type else None
    if kind is None:
        raise ValueError("the step has no call")
    path, response_type = METHODS[kind]
    return path, getattr(step, kind).SerializeToString(), response_type


def _type(name: str) -> type[Message]:
    found: type[Message] = symbol_database.Default().GetSymbol(name)
    return found


async def _grpc(target: Target, step: pb.Step, key: str | None, on_first: Callable[[], None]) -> Outcome:
    path, data, response_type = _request(step)
    kind = step.WhichOneof("call")
    request = getattr(step, kind) if kind in METHODS else None
    outcome = Outcome(deadline_ms=step.deadline_ms or DEFAULT_DEADLINE_MS, request=request)
    # A bidirectional call would write the request after the headers: INTERNAL if the server ends it before.
    method: Any = target.channel.unary_stream(path)
    metadata = [*step.metadata.items(), *([("authorization", f"Bearer {key}")] if key is not None else [])]
    started = time.monotonic()
    call: grpc.aio.UnaryStreamCall[bytes, bytes] = method(
        data,
        timeout=outcome.deadline_ms / 1000,
        metadata=metadata,
        compression=grpc.Compression.Gzip if step.gzip else None,
    )
    if step.cancel_after < 0:
        await asyncio.sleep(step.pause_ms / 1000)
        call.cancel()
    try:
        async for message in call:
            if not outcome.messages:
                outcome.first_message_ms = (time.monotonic() - started) * 1000
            outcome.messages.append(_parse(message, response_type))
            on_first()
            if len(outcome.messages) == 1 and step.pause_ms:
                await asyncio.sleep(step.pause_ms / 1000)
            if len(outcome.messages) in {step.cancel_after, step.raw_call.messages}:
                call.cancel()
        outcome.trailers = _pairs(await call.trailing_metadata())
    except grpc.aio.AioRpcError as error:
        _fill_error(outcome, error)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if not call.cancelled() or (task is not None and task.cancelling()):  # the kit ends the case
            raise
        outcome.code = "OK" if step.raw_call.messages and outcome.messages else "CANCELLED"
    return outcome


def _parse(data: bytes, response_type: type[Message] | None) -> Message:
    message = (response_type or error_details_pb2.Help)()
    if response_type is not None:
        message.ParseFromString(data)
    return message


def _fill_error(outcome: Outcome, error: grpc.aio.AioRpcError) -> None:
    outcome.code, outcome.message = error.code().name, error.details() or ""
    outcome.trailers = _pairs(error.trailing_metadata())
    for key, value in outcome.trailers:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            try:
                outcome.status.ParseFromString(value)
            except DecodeError:
                outcome.status = status_pb2.Status(message="the details are not a google.rpc.Status")


def _pairs(metadata: Any) -> list[tuple[str, str | bytes]]:
    return [(key, value) for key, value in metadata or ()]


async def _http(target: Target, step: pb.Step, key: str | None, on_first: Callable[[], None]) -> Outcome:
    if target.http is None:
        raise ValueError("the case needs --json URL")
    call = step.http_call
    headers = {"content-type": call.content_type or "application/json", **step.metadata}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    outcome, started = Outcome(), time.monotonic()
    request = target.http.stream(
        call.method or "POST",
        call.path or "/v1/generate",
        content=call.body.encode("utf-8", "surrogatepass"),
        headers=headers,
    )
    body = b""
    async with request as response:
        async for part in response.aiter_bytes():
            if not body:
                outcome.first_message_ms = (time.monotonic() - started) * 1000
                on_first()
            body += part
    outcome.http_status, outcome.headers = response.status_code, dict(response.headers)
    _fill_http(outcome, body.decode())
    return outcome


def _fill_http(outcome: Outcome, body: str) -> None:
    """Fill the messages, or the code and the details of an error."""
    if outcome.headers.get("content-type", "").startswith("text/event-stream"):
        outcome.messages = events(body)
        return
    document = json.loads(body) if body else {}
    outcome.messages = [document]
    if outcome.http_status >= 400 and isinstance(document, dict) and "code" in document:
        outcome.code = code_pb2.Code.Name(document["code"])
        outcome.message = str(document.get("message", ""))
        Parse(json.dumps({**document}), outcome.status)
