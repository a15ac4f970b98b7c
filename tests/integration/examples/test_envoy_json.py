"""`examples/envoy` with a real Envoy: the card's JSON and events."""

import asyncio
import json
from typing import Any

import jsonschema
import pytest
from tests.integration.examples.conftest import REPLY, EnvoyMaker
from tests.integration.examples.envoy_responses import events

from llama2_server.card import ModelCard, load_card


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "Tell me a story."},
        {"prompt": "Tell me a story.", "raw": True, "stream": False, "max_tokens": 100},
        {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "max_tokens": 100,
        },
        {"prompt": "Tell me a story.", "temperature": 0, "seed": 2**64 - 1, "stop": ["!"], "no_cache": True},
    ],
)
async def test_json_gets_the_first_output_form(serve_behind_envoy: EnvoyMaker, body: dict[str, Any]) -> None:
    """A body of the card's input schema gets `{"response": ...}`, valid by the card's output schema."""
    card = load_card("llama-2-7b-chat-fp16")
    jsonschema.validate(body, json.loads(card.input_schema))
    async with serve_behind_envoy() as (_, envoy):
        reply = await envoy.post(body)
        assert reply.status_code == 200
        assert reply.headers["content-type"] == "application/json"
        jsonschema.validate(reply.json(), json.loads(card.output_schema))
        assert reply.json()["response"].strip() == REPLY
        assert reply.json()["completion"]["finish_reason"] == "FINISH_REASON_END_OF_SEQUENCE"
        if "seed" in body:
            assert reply.json()["completion"]["seed"] == str(body["seed"])
        assert not any("story" in line for line in envoy.log)


async def test_stream_true_gets_the_second_output_form(serve_behind_envoy: EnvoyMaker) -> None:
    """With `stream: true`, the same URL returns events `data: {"response": ...}`; the last has `completion`."""
    async with serve_behind_envoy() as (_, envoy):
        for content_type in ("application/json", "application/json; charset=utf-8"):
            reply = await envoy.post({"prompt": "hi", "stream": True}, **{"content-type": content_type})
            assert reply.status_code == 200
            assert reply.headers["content-type"] == "text/event-stream"
            *parts, last = events(reply.text)
            assert parts
            assert "".join(event["response"] for event in [*parts, last]) == REPLY
            assert all(event.keys() == {"response"} for event in parts)
            assert last["completion"]["finish_reason"] == "FINISH_REASON_END_OF_SEQUENCE"


@pytest.mark.parametrize(("seed", "status"), [(2**63 - 1, 200), (str(2**64 - 1), 200), (2**64 - 1, 400)])
async def test_streams_need_quotes_around_the_largest_numbers(
    serve_behind_envoy: EnvoyMaker, seed: int | str, status: int
) -> None:
    """Envoy does not find `stream` in a body with a number of 2^63 or more; the README states it."""
    async with serve_behind_envoy() as (_, envoy):
        reply = await envoy.post({"prompt": "hi", "stream": True, "seed": seed})
        assert reply.status_code == status
        if status == 200:
            assert events(reply.text)[-1]["completion"]["seed"] == str(seed)
        else:
            assert "stream: is true" in reply.json()["message"]


async def test_events_are_not_buffered(serve_behind_envoy: EnvoyMaker, first_token: str) -> None:
    """Envoy forwards the first event while the model waits before the second token."""
    async with serve_behind_envoy() as (service, envoy):
        service.model.gate()
        service.model.allow(1)
        async with envoy.http.stream("POST", "/v1/generate", json={"prompt": "hi", "stream": True}) as reply:
            lines = reply.aiter_lines()
            assert json.loads((await anext(lines)).removeprefix("data: "))["response"] == first_token
            await service.model.wait_until_blocked(1)
            service.model.open_gate()
            rest = [line async for line in lines]
        assert "completion" in rest[-2]


async def test_a_disconnect_frees_the_slot(serve_behind_envoy: EnvoyMaker) -> None:
    """The disconnect of an HTTP client stops the model; the next request does not wait for the end of the reply."""
    async with serve_behind_envoy(ends=False) as (service, envoy):
        service.model.gate()
        service.model.allow(1)
        endless = {"prompt": "hi", "stream": True, "max_tokens": 900}
        async with envoy.http.stream("POST", "/v1/generate", json=endless) as reply:
            await anext(reply.aiter_lines())
        following = asyncio.create_task(envoy.post({"prompt": "next", "max_tokens": 1}))
        while not following.done():
            # One step of the model per answer of Envoy, which reports the disconnect long before 900 steps.
            service.model.allow(1)
            await envoy.http.get(f"http://{envoy.admin}/ready")
        assert (await following).status_code == 200
        assert len(service.model.decoded_rows) < 800


async def test_a_failed_stream_ends_without_completion(serve_behind_envoy: EnvoyMaker) -> None:
    """The HTTP status is sent with the first event, so a missing `completion` indicates a later error."""
    async with serve_behind_envoy() as (service, envoy):
        service.model.gate()
        service.model.allow(1)
        async with envoy.http.stream("POST", "/v1/generate", json={"prompt": "hi", "stream": True}) as reply:
            lines = reply.aiter_lines()
            await anext(lines)
            service.model.failure = RuntimeError("an error")
            service.model.open_gate()
            rest = [line async for line in lines]
        assert not any("completion" in line for line in rest)


async def test_other_rpcs_accept_json_under_their_grpc_paths(
    serve_behind_envoy: EnvoyMaker, demo_card: ModelCard
) -> None:
    """CountTokens, GetModelCard and GetUsage accept JSON; 0 and false are printed, with the protos' field names."""
    async with serve_behind_envoy() as (_, envoy):
        counted = await envoy.post({"prompt": "hi"}, "/llama2.v1.TextGenerationService/CountTokens")
        assert counted.json()["input_tokens"] > 0
        card = await envoy.post({}, "/llama2.v1.ModelService/GetModelCard")
        assert card.json()["model_card"]["name"] == demo_card.name
        usage = await envoy.post({}, "/llama2.v1.AccountService/GetUsage")
        assert usage.json()["account"] == "anonymous"


LENIENT = [
    {"prompt": "hi", "unknown": {"a": [1]}},
    {"prompt": "hi", "maxTokens": 1},
    {"prompt": "hi", "stream": None, "max_tokens": None},
    {"prompt": "hi", "raw": "yes"},
    {"prompt": "hi", "max_tokens": "5"},
    {"prompt": "hi", "stop": "!"},
]


async def test_envoy_accepts_more_than_the_schema(serve_behind_envoy: EnvoyMaker) -> None:
    """Protobuf's JSON parser accepts more than the card's schema, as the README describes."""
    async with serve_behind_envoy() as (_, envoy):
        for body in LENIENT:
            assert (await envoy.post(body)).status_code == 200, body
        short = await envoy.post({"prompt": "hi", "maxTokens": 1})
        assert short.json()["completion"]["finish_reason"] == "FINISH_REASON_MAX_TOKENS"
