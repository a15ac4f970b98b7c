"""The URL of the hosted endpoint through Envoy: the host's formats, and every error of its table."""

import asyncio
import gzip
import json
import re
import shlex
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.integration.examples.conftest import REPLY, EnvoyMaker
from tests.support.processes import free_port
from tests.support.repository import ROOT
from tests.support.servers.envoy_server import running_envoy
from tests.support.service import until, with_config

from llama2_server.admission.accounts import ApiKeyAuthenticator
from llama2_server.admission.keys.keys_file import new_key
from llama2_server.card import ModelCard, RequestsPerMinute, load_card

CARD = load_card("llama-2-7b-chat-fp16")
ACCOUNT = "0123456789abcdef0123456789abcdef"
URL = f"/client/v4/accounts/{ACCOUNT}/ai/run/{CARD.name}"
PROMPT = {"prompt": "Tell me a story."}
USAGE = {"prompt_tokens", "completion_tokens", "total_tokens"}


def envelope_error(response: httpx2.Response) -> tuple[int, int, str]:
    """Return status, code and message of an error, and check that nothing of gRPC is in it."""
    body = response.json()
    assert body.keys() == {"result", "success", "errors", "messages"}
    assert (body["result"], body["success"], body["messages"]) == (None, False, [])
    assert response.headers["content-type"] == "application/json"
    assert not any(name.startswith(("grpc-", "llama2-")) for name in response.headers)
    return response.status_code, body["errors"][0]["code"], body["errors"][0]["message"]


def data_lines(text: str) -> list[str]:
    """Return the data of each event; only `data:` lines and the empty lines after them are allowed."""
    assert text.endswith("\n\n")
    blocks = text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") and len(block.splitlines()) == 1 for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


@pytest.mark.parametrize("name", [CARD.name, CARD.name.replace("/", "%2F"), "%40cf%2Fmeta%2Fllama-2-7b-chat-fp16"])
async def test_a_result(serve_behind_envoy: EnvoyMaker, name: str) -> None:
    """The reply is in the host's envelope, for each encoding of the model's slashes and with a query."""
    async with serve_behind_envoy(card=CARD) as (_, envoy):
        reply = await envoy.post(PROMPT, f"/client/v4/accounts/{ACCOUNT}/ai/run/{name}?from=here")
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"] == "application/json"
        body = reply.json()
        assert body.keys() == {"result", "success", "errors", "messages"}
        assert (body["success"], body["errors"], body["messages"]) == (True, [], [])
        assert body["result"].keys() == {"response", "usage"}
        assert body["result"]["response"] == REPLY
        usage = body["result"]["usage"]
        assert usage.keys() == USAGE
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        counted = await envoy.post(PROMPT, "/llama2.v1.TextGenerationService/CountTokens")
        assert usage["prompt_tokens"] == counted.json()["input_tokens"]


@pytest.mark.parametrize("name", [CARD.name, CARD.name.replace("/", "%2F")])
async def test_a_stream(serve_behind_envoy: EnvoyMaker, name: str) -> None:
    """The events are the pieces, then an empty piece with the usage, then `[DONE]`."""
    async with serve_behind_envoy(card=CARD) as (_, envoy):
        path = f"/client/v4/accounts/{ACCOUNT}/ai/run/{name}"
        reply = await envoy.post(PROMPT | {"stream": True}, path)
        assert reply.status_code == 200
        assert reply.headers["content-type"] == "text/event-stream"
        *pieces, usage, done = data_lines(reply.text)
        assert done == "[DONE]"
        assert all(json.loads(piece).keys() == {"response"} for piece in pieces)
        assert "".join(json.loads(piece)["response"] for piece in pieces) == REPLY
        assert json.loads(usage)["response"] == ""
        unary = await envoy.post(PROMPT, path)
        assert json.loads(usage)["usage"] == unary.json()["result"]["usage"]


async def test_events_are_not_buffered(serve_behind_envoy: EnvoyMaker, first_token: str) -> None:
    """The first event arrives while the model waits before the second token."""
    async with serve_behind_envoy(card=CARD) as (service, envoy):
        service.model.gate()
        service.model.allow(1)
        async with envoy.http.stream("POST", URL, json=PROMPT | {"stream": True}) as reply:
            lines = reply.aiter_lines()
            assert await anext(lines) == f'data: {{"response": "{first_token}"}}'
            await service.model.wait_until_blocked(1)
            service.model.open_gate()
            rest = [line async for line in lines]
        assert rest[-2] == "data: [DONE]"


async def test_an_error_after_the_first_event(serve_behind_envoy: EnvoyMaker) -> None:
    """The last event is the envelope of the error, and `[DONE]` is missing."""
    async with serve_behind_envoy(card=CARD) as (service, envoy):
        service.model.gate()
        service.model.allow(1)
        async with envoy.http.stream("POST", URL, json=PROMPT | {"stream": True}) as reply:
            lines = reply.aiter_lines()
            first = await anext(lines)
            service.model.failure = RuntimeError("swordfish")
            service.model.open_gate()
            rest = [line async for line in lines]
        *_, last = data_lines("\n".join([first, *rest, ""]))
        error = json.loads(last)
        assert (error["result"], error["success"]) == (None, False)
        assert error["errors"][0]["code"] in {500, 503}
        assert "swordfish" not in last


def encoded(content_type: str, **headers: str) -> dict[str, Any]:
    """Return a compressed or plain request of `PROMPT` with a content type."""
    body = json.dumps(PROMPT | {"stream": True}).encode()
    content = gzip.compress(body) if "content-encoding" in headers else body
    return {"content": content, "headers": {"content-type": content_type} | headers}


@pytest.mark.parametrize(
    "request_",
    [
        encoded("Application/JSON"),
        encoded("APPLICATION/JSON; charset=utf-8"),
        encoded("application/json", **{"content-encoding": "gzip"}),
        encoded("application/x-www-form-urlencoded", authorization="Bearer any"),  # curl's default type
        encoded("text/plain;charset=UTF-8", authorization="Bearer any"),
    ],
)
async def test_types_and_encodings(serve_behind_envoy: EnvoyMaker, request_: dict[str, Any]) -> None:
    """Types in any case, gzip, and with a key also curl's default type are read, and `stream` is found in each."""
    async with serve_behind_envoy(card=CARD) as (_, envoy):
        reply = await envoy.http.post(URL, **request_)
        assert (reply.status_code, reply.headers["content-type"]) == (200, "text/event-stream"), reply.text


async def test_generate_accepts_the_same_types(serve_behind_envoy: EnvoyMaker) -> None:
    """`/v1/generate` accepts `Application/JSON` and gzip, too; a key does not make it accept other types."""
    async with serve_behind_envoy() as (_, envoy):
        for request in (encoded("Application/JSON"), encoded("application/json", **{"content-encoding": "gzip"})):
            reply = await envoy.http.post("/v1/generate", **request)
            assert (reply.status_code, reply.headers["content-type"]) == (200, "text/event-stream")
        form = encoded("text/plain", authorization="Bearer any")
        assert (await envoy.http.post("/v1/generate", **form)).status_code == 415


async def test_a_small_body_that_decompresses_to_a_large_one(serve_behind_envoy: EnvoyMaker) -> None:
    """The limit counts decompressed bytes; Envoy answers before it has decompressed 100 MB."""
    async with serve_behind_envoy(card=CARD) as (_, envoy):
        bomb = gzip.compress(b"[" + b" " * 100_000_000)
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        assert envelope_error(await envoy.http.post(URL, content=bomb, headers=headers))[:2] == (413, 3006)


INVALID = [
    ({}, "prompt: either prompt or messages is required"),
    ({"prompt": "x" * 4097}, "prompt: must have at most 4096 characters, got 4097"),
    ({"messages": [{"role": "user", "content": [{"text": "hi"}]}]}, "messages[0].content: must be of type string"),
    ({"prompt": "hi", "max_tokens": 0}, "max_tokens: must be in [1, 2500], got 0"),
    ('{"prompt": ', "the body must be one JSON object, in UTF-8"),
    ("", "the body must be one JSON object, in UTF-8"),
]


async def test_invalid_input_and_models(serve_behind_envoy: EnvoyMaker) -> None:
    """Invalid input is 400/3003 with the path of each field, in both forms; another model is 400/5007."""
    async with serve_behind_envoy(card=CARD) as (service, envoy):
        for body, message in INVALID:
            assert envelope_error(await envoy.post(body, URL)) == (400, 3003, message)
        streamed = {"prompt": "hi", "stream": True, "top_p": 2, "stop": [""]}
        rejected = await envoy.post(streamed, URL)
        assert envelope_error(rejected) == (400, 3003, "top_p: must be in (0, 1], got 2")
        assert [error["message"] for error in rejected.json()["errors"]][1].startswith("stop[0]: ")
        for stream in (False, True):
            other = await envoy.post(PROMPT | {"stream": stream}, f"{URL}-other")
            status, code, message = envelope_error(other)
            assert (status, code) == (400, 5007)
            assert message.endswith(CARD.name)
        assert service.model.prefills == 0


async def test_paths_methods_and_types(serve_behind_envoy: EnvoyMaker) -> None:
    """Another path is 404/7003; another method and, without a key, another type get the envelope, too."""
    async with serve_behind_envoy(card=CARD) as (_, envoy):
        for path in ("", f"accounts/{ACCOUNT}/ai/models", f"account/{ACCOUNT}/ai/run/{CARD.name}"):
            assert envelope_error(await envoy.post(PROMPT, f"/client/v4/{path}"))[:2] == (404, 7003)
        got = await envoy.http.get(URL)
        assert envelope_error(got)[:2] == (405, 405)
        assert got.headers["allow"] == "POST"
        assert envelope_error(await envoy.http.post(URL, **encoded("text/plain")))[:2] == (415, 415)


async def test_a_large_request(serve_behind_envoy: EnvoyMaker) -> None:
    """413/3006 from Envoy beyond 1 MiB, and from the service at its own limit."""
    async with serve_behind_envoy(card=CARD) as (_, envoy):
        for size in (2_000_000, 2**20 - 20):
            assert envelope_error(await envoy.post({"prompt": "x" * size}, URL))[:2] == (413, 3006)


async def test_keys_and_accounts(serve_behind_envoy: EnvoyMaker, tmp_path: Path) -> None:
    """The account in the path must be the key's; without a key 401, with the key of a disabled account 403."""
    (key, line), (disabled_key, disabled_line) = new_key(ACCOUNT), new_key("bob")
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"keys:\n  {line}\n  {disabled_line.rstrip('}')}, enabled: false}}\n")
    async with serve_behind_envoy(card=CARD, accounts=ApiKeyAuthenticator(keys)) as (service, envoy):
        for stream in (False, True):
            body = PROMPT | {"stream": stream}
            assert (await envoy.post(body, URL, authorization=f"Bearer {key}")).status_code == 200
            assert envelope_error(await envoy.post(body, URL))[:2] == (401, 10000)
            assert envelope_error(await envoy.post(body, URL, authorization="Bearer l2_wrong"))[:2] == (401, 10000)
            other = await envoy.post(body, URL.replace(ACCOUNT, "alice"), authorization=f"Bearer {key}")
            assert envelope_error(other)[:2] == (401, 10000)
            disabled = await envoy.post(body, URL.replace(ACCOUNT, "bob"), authorization=f"Bearer {disabled_key}")
            assert envelope_error(disabled)[:2] == (403, 3023)
        assert service.model.prefills == 1


async def test_quota(serve_behind_envoy: EnvoyMaker) -> None:
    """A used-up quota is 429/3036 with the time to wait, in both forms; an early call keeps its time."""
    card = with_config(CARD, infer_response_cache=None, max_requests_per_min=RequestsPerMinute(default=1))
    async with serve_behind_envoy(card=card) as (_, envoy):
        assert (await envoy.post(PROMPT, URL)).status_code == 200
        for stream in (False, True):
            rejected = await envoy.post(PROMPT | {"stream": stream}, URL)
            assert envelope_error(rejected)[:2] == (429, 3036)
            assert 0 < int(rejected.headers["retry-after"]) <= 60


async def test_a_full_queue(serve_behind_envoy: EnvoyMaker) -> None:
    """A full queue is 429/3040 with the time to wait."""
    async with serve_behind_envoy(card=CARD, max_queue_size=0) as (service, envoy):
        service.model.gate()
        holder = asyncio.create_task(envoy.post({"prompt": "hold"}, URL))
        await asyncio.to_thread(service.model.in_step.wait, 10)
        rejected = await envoy.post(PROMPT, URL)
        assert envelope_error(rejected)[:2] == (429, 3040)
        assert int(rejected.headers["retry-after"]) >= 1
        service.model.open_gate()
        assert (await holder).status_code == 200


async def test_a_deadline(serve_behind_envoy: EnvoyMaker) -> None:
    """A passed deadline is 408/3007, however it is noticed."""
    async with serve_behind_envoy(card=CARD) as (service, envoy):
        service.model.gate()
        late = await envoy.post(PROMPT, URL, **{"grpc-timeout": "50m"})
        assert envelope_error(late)[:2] == (408, 3007)


async def test_a_deadline_after_the_first_event(serve_behind_envoy: EnvoyMaker) -> None:
    """The last event is the envelope of the passed deadline, and the slot is free."""
    async with serve_behind_envoy(card=CARD) as (service, envoy):
        service.model.gate()
        service.model.allow(1)
        timeout = {"grpc-timeout": "1S"}
        async with envoy.http.stream("POST", URL, json=PROMPT | {"stream": True}, headers=timeout) as reply:
            events = data_lines("\n".join([*[line async for line in reply.aiter_lines()], ""]))
        assert len(events) > 1
        assert json.loads(events[-1])["errors"][0]["code"] == 3007
        service.model.open_gate()
        await until(lambda: service.finished_calls("DEADLINE_EXCEEDED") == 1)


async def test_no_server(tmp_path: Path) -> None:
    """Without a server 503 with the time to wait, from Envoy."""
    async with running_envoy(tmp_path, f"127.0.0.1:{free_port()}") as envoy:
        rejected = await envoy.post(PROMPT, URL)
        assert envelope_error(rejected)[:2] == (503, 503)
        assert int(rejected.headers["retry-after"]) >= 1


async def test_the_demo_model_has_its_own_name(serve_behind_envoy: EnvoyMaker, demo_card: ModelCard) -> None:
    """The name in the URL is the card's, whichever card the server has; the former host's model is then unknown."""
    async with serve_behind_envoy() as (_, envoy):
        assert (await envoy.post(PROMPT, URL.replace(CARD.name, demo_card.name))).status_code == 200
        assert envelope_error(await envoy.post(PROMPT, URL))[1] == 5007


async def test_the_documented_command(serve_behind_envoy: EnvoyMaker, tmp_path: Path) -> None:
    """The curl command of docs/hosted-endpoint.md, sent as curl sends it, gets a reply."""
    (block,) = re.findall(r"(?ms)^```sh\n(.*?)^```", (ROOT / "docs/hosted-endpoint.md").read_text(encoding="utf-8"))
    key, line = new_key(ACCOUNT)
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"keys:\n  {line}\n")
    command = block.replace("$ACCOUNT_ID", ACCOUNT).replace("$LLAMA2_API_KEY", key).replace("\\\n", "")
    curl, url, header_flag, header, data_flag, data = shlex.split(command)
    assert (curl, header_flag, data_flag) == ("curl", "-H", "-d")
    headers = dict([header.split(": ")]) | {"content-type": "application/x-www-form-urlencoded"}
    async with serve_behind_envoy(card=CARD, accounts=ApiKeyAuthenticator(keys)) as (_, envoy):
        path = url.removeprefix("http://127.0.0.1:8080")
        reply = await envoy.http.post(path, content=data, headers=headers)
        assert reply.json()["result"]["response"] == REPLY, reply.text
