"""`grpc-retry-pushback-ms` and the deadline of a call, over a real socket, with a gRPC client that retries."""

import asyncio
import json
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from tests.support.deadlines import CallDeadlines
from tests.support.service import Service, ServiceMaker, details, hold_slot, with_config

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_server.card import ModelCard, RequestsPerMinute

REQUEST = pb.GenerateRequest(prompt="a story", no_cache=True)
RETRIES = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.01s",
                "maxBackoff": "0.01s",
                "backoffMultiplier": 1,
                "retryableStatusCodes": ["RESOURCE_EXHAUSTED", "UNAVAILABLE"],
            },
        }
    ]
}


async def rejected_call(service: Service, timeout: float | None) -> grpc.aio.AioRpcError:
    """Return the error of a call of a client that retries, as gRPC's service config asks it to."""
    options = [("grpc.service_config", json.dumps(RETRIES))]
    async with grpc.aio.insecure_channel(service.address, options) as channel:
        stub: Any = text_generation_pb2_grpc.TextGenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await stub.Generate(REQUEST, timeout=timeout)
        return rejected.value


async def test_wait_beyond_the_deadline_forbids_the_retry(serve_scripted: ServiceMaker, demo_card: ModelCard) -> None:
    """The pushback is -1, so the client does not sleep: it returns the rejection with its RetryInfo."""
    card = with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=1))
    async with serve_scripted(card=card) as service:
        await service.text.Generate(REQUEST)
        error = await rejected_call(service, timeout=10)
    check_forbids_retries(error, grpc.StatusCode.RESOURCE_EXHAUSTED)


async def test_shutdown_near_the_deadline_forbids_the_retry(
    serve_scripted: ServiceMaker, deadlines: CallDeadlines
) -> None:
    """A queued call whose deadline is nearer than the delay of RetryInfo gets the pushback -1."""
    async with serve_scripted() as service:
        await hold_slot(service)
        queued = asyncio.create_task(rejected_call(service, timeout=60))
        await service.wait_until_queued(1)
        deadlines.set_remaining(0.9)
    check_forbids_retries(await queued, grpc.StatusCode.UNAVAILABLE)


def check_forbids_retries(error: grpc.aio.AioRpcError, code: grpc.StatusCode) -> None:
    """Check for a delay in RetryInfo and the pushback -1."""
    assert error.code() is code
    retry_info = details(error)["RetryInfo"]
    assert isinstance(retry_info, error_details_pb2.RetryInfo)
    assert retry_info.retry_delay.ToMilliseconds() > 0
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"


async def test_wait_within_the_deadline_is_the_pushback(serve_scripted: ServiceMaker, demo_card: ModelCard) -> None:
    """With a deadline that leaves time for the wait, the pushback repeats the delay of RetryInfo."""
    card = with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=1))
    async with serve_scripted(card=card) as service:
        await service.text.Generate(REQUEST)
        for timeout in (120, None):
            with pytest.raises(grpc.aio.AioRpcError) as rejected:
                await service.text.Generate(REQUEST, timeout=timeout)
            retry_info = details(rejected.value)["RetryInfo"]
            assert isinstance(retry_info, error_details_pb2.RetryInfo)
            pushback = dict(rejected.value.trailing_metadata())["grpc-retry-pushback-ms"]
            assert int(pushback) == retry_info.retry_delay.ToMilliseconds() > 0
