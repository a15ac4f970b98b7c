"""Services and calls for the tests of idempotency keys."""

import sqlite3
from pathlib import Path
from typing import Any

import grpc.aio
from tests.integration.service.conftest import caching_card as caching_card  # noqa: PLC0414 - a fixture
from tests.support.service import Service, UnaryStream, until

from llama2.v1 import text_generation_pb2 as pb

REPLY = "Once upon a time, a fox 🦊 lived by the sea."


def keyed(key: str = "key", prompt: str = "a story", **fields: Any) -> pb.GenerateRequest:
    """Return a request with an idempotency key."""
    return pb.GenerateRequest(prompt=prompt, idempotency_key=key, **fields)


async def read_stream(service: Service, request: pb.GenerateRequest) -> tuple[str, pb.Completion]:
    """Read a stream to its end, and return its text and its completion; only its first message has the position."""
    text, completion, position = "", pb.Completion(), request.resume_after_characters or None
    async for part in service.text.GenerateStream(request):
        assert part.HasField("resumed_after_characters") == (position is not None)
        assert part.resumed_after_characters == (position or 0)
        position = None
        text += part.response
        completion = part.completion
    return text, completion


async def start_stream(service: Service, request: pb.GenerateRequest, deltas: int = 1) -> tuple[UnaryStream, str]:
    """Return a call that has read this number of deltas, and the text; the model is in its next step."""
    service.model.gate()
    call: UnaryStream = service.text.GenerateStream(request)
    text = ""
    for _ in range(deltas):  # one step at a time, because several steps can share a delta
        service.model.allow(1)
        text += (await call.read()).response
    await service.wait_until_in_step()
    return call, text


async def wait_until_stopped(service: Service) -> None:
    """Let the gated model take steps until no sequence runs."""
    service.model.open_gate()
    await until(lambda: service.metrics.registry.get_sample_value("llama2_requests_running") == 0)


def without_timings(completion: pb.Completion) -> pb.Completion:
    """Return the part of a completion that is equal in all calls of a key."""
    equal = pb.Completion()
    equal.CopyFrom(completion)
    equal.ClearField("timings")
    return equal


def stored_keys(folder: Path) -> list[dict[str, Any]]:
    """Return the idempotency keys of a data directory, as stored."""
    connection = sqlite3.connect(folder / "usage.db")
    connection.row_factory = sqlite3.Row
    rows = [dict(row) for row in connection.execute("SELECT * FROM idempotency_keys")]
    connection.close()
    return rows


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """Return the error of a call."""
    try:
        if isinstance(call, grpc.aio.UnaryStreamCall):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call succeeded")
