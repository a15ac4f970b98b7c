"""A full queue is fair between accounts, over a real socket."""

import asyncio
from typing import Any

import grpc.aio
import pytest
from google.rpc import error_details_pb2
from tests.support.accounts import AccountByHeader, as_account
from tests.support.service import Service, ServiceMaker, details, with_config
from torch import Tensor

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.card import ModelCard, RequestsPerMinute

QUEUE_SIZE = 4
QUIET_PROMPT = "a story about a quiet account " * 5


def start(service: Service, account_id: str, prompt: str) -> "asyncio.Task[pb.GenerateResponse]":
    async def call() -> pb.GenerateResponse:
        request = pb.GenerateRequest(prompt=prompt, no_cache=True)
        return await service.text.Generate(request, metadata=as_account(account_id))

    return asyncio.create_task(call())


def record_prefills(service: Service, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of input tokens of each generation when it starts."""
    prompts: list[int] = []
    prefill = service.model.prefill

    def recorded_prefill(slot: int, token_ids: list[int], position: int) -> Tensor:
        prompts.append(len(token_ids))
        return prefill(slot, token_ids, position)

    monkeypatch.setattr(service.model, "prefill", recorded_prefill)
    return prompts


async def test_flood_of_one_account_lets_another_in(
    serve_scripted: ServiceMaker, demo_card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 calls meet another account's full queue; each starts third, and displaces one call, which is served later."""
    card = with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=10**6))
    async with serve_scripted("Hi.", card=card, max_queue_size=QUEUE_SIZE, accounts=AccountByHeader()) as service:
        prompts = record_prefills(service, monkeypatch)
        for _ in range(15):
            prompts.clear()
            service.model.gate()
            flood: list[asyncio.Task[Any]] = [start(service, "flood", "a story") for _ in range(QUEUE_SIZE + 1)]
            await service.wait_until_queued(QUEUE_SIZE)
            quiet = start(service, "quiet", QUIET_PROMPT)
            (displaced,), served = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
            with pytest.raises(grpc.aio.AioRpcError) as rejected:
                await displaced
            found = details(rejected.value)
            info, retry = found["ErrorInfo"], found["RetryInfo"]
            assert isinstance(info, error_details_pb2.ErrorInfo)
            assert isinstance(retry, error_details_pb2.RetryInfo)
            assert (rejected.value.code(), info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            service.model.open_gate()
            assert (await quiet).response == "Hi."
            assert {(await call).response for call in served} == {"Hi."}
            assert prompts.index(max(prompts)) == 2
            await asyncio.sleep(retry.retry_delay.ToTimedelta().total_seconds())  # space is kept for this call
            assert (await start(service, "flood", "a story")).response == "Hi."
