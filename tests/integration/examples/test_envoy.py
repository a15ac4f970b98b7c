"""`examples/envoy` with a real Envoy: the card's JSON, events, gRPC-Web and gRPC, refusals, and several servers."""

import asyncio
import base64
import contextlib
import json
import os
import re
import shlex
import shutil
import ssl
import struct
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import pytest
import yaml
from tests.support.certificates import Authority
from tests.support.envoy_server import DESCRIPTORS, EXAMPLE, Envoy, envoy_command, running_envoy
from tests.support.name_server import running_name_server
from tests.support.service import (
    ONE_PORT_HOSTS,
    Service,
    ServiceMaker,
    needs_one_port_hosts,
    prefills,
    three_services,
    with_config,
)

from llama2.v1 import text_generation_pb2 as pb
from llama2_client import Client
from llama2_client.errors import InvalidRequest
from llama2_server.admission.accounts import ApiKeyAuthenticator, new_key
from llama2_server.card import ModelCard, RequestsPerMinute, load_card

REPLY = "Once upon a time."
GENERATE = "/llama2.v1.TextGenerationService/Generate"
PAGE = "http://localhost:3000"  # the web page that the example's CORS policy allows
EnvoyMaker = Any  # makes an AbstractAsyncContextManager[tuple[Service, Envoy]]


@pytest.fixture
def serve_behind_envoy(serve_scripted: ServiceMaker, tmp_path: Path) -> EnvoyMaker:
    """Makes a scripted service with an Envoy in front; keywords are the service's."""

    @asynccontextmanager
    async def serve(**options: Any) -> AsyncIterator[tuple[Service, Envoy]]:
        async with serve_scripted(REPLY, **options) as service, running_envoy(tmp_path, service.address) as envoy:
            yield service, envoy

    return serve


def events(text: str) -> list[dict[str, Any]]:
    """The messages of an event stream, whose form is checked."""
    assert text.endswith("\n\n")
    blocks = text.strip().split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def details(response: httpx2.Response) -> dict[str, Any]:
    """The details of a refusal by type; every refusal is a google.rpc.Status in JSON."""
    assert response.headers["content-type"] == "application/json"
    status = response.json()
    assert status.keys() == {"code", "message", "details"}
    assert status["message"]
    return {detail["@type"].removeprefix("type.googleapis.com/google.rpc."): detail for detail in status["details"]}


def violations(response: httpx2.Response) -> dict[str, str]:
    """Field and description of each violation of a BadRequest."""
    assert response.status_code == 400
    assert response.json()["code"] == 3
    return {entry["field"]: entry["description"] for entry in details(response)["BadRequest"]["field_violations"]}


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
async def test_the_cards_json_in_and_its_first_output_form_out(
    serve_behind_envoy: EnvoyMaker, body: dict[str, Any]
) -> None:
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
    """With `stream: true` the same URL answers with events `data: {"response": ...}`; the last has `completion`."""
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


async def test_events_come_as_the_model_makes_them(serve_behind_envoy: EnvoyMaker) -> None:
    """Envoy holds nothing back: the first event is there while the model waits before the second token."""
    async with serve_behind_envoy() as (service, envoy):
        service.model.gate()
        service.model.allow(1)
        async with envoy.http.stream("POST", "/v1/generate", json={"prompt": "hi", "stream": True}) as reply:
            lines = reply.aiter_lines()
            assert json.loads((await anext(lines)).removeprefix("data: "))["response"] == "Once"
            await service.model.wait_until_blocked(1)
            service.model.open_gate()
            rest = [line async for line in lines]
        assert "completion" in rest[-2]


async def test_who_hangs_up_frees_the_slot(serve_behind_envoy: EnvoyMaker) -> None:
    """An HTTP caller who goes away stops the model; the next caller does not wait for the end of that reply."""
    async with serve_behind_envoy(ends=False) as (service, envoy):
        service.model.gate()
        service.model.allow(1)
        endless = {"prompt": "hi", "stream": True, "max_tokens": 900}
        async with envoy.http.stream("POST", "/v1/generate", json=endless) as reply:
            await anext(reply.aiter_lines())
        following = asyncio.create_task(envoy.post({"prompt": "next", "max_tokens": 1}))
        while not following.done():
            # One step of the model for each answer of Envoy: it hears of the end long before 900 of them.
            service.model.allow(1)
            await envoy.http.get(f"http://{envoy.admin}/ready")
        assert (await following).status_code == 200
        assert len(service.model.decoded_rows) < 800


async def test_a_stream_that_fails_halfway_ends_without_completion(serve_behind_envoy: EnvoyMaker) -> None:
    """Once the first event is sent the HTTP status is too: what tells a broken reply is that no `completion` comes."""
    async with serve_behind_envoy() as (service, envoy):
        service.model.gate()
        service.model.allow(1)
        async with envoy.http.stream("POST", "/v1/generate", json={"prompt": "hi", "stream": True}) as reply:
            lines = reply.aiter_lines()
            await anext(lines)
            service.model.failure = RuntimeError("a fault")
            service.model.open_gate()
            rest = [line async for line in lines]
        assert not any("completion" in line for line in rest)


async def test_other_rpcs_take_json_under_their_grpc_names(
    serve_behind_envoy: EnvoyMaker, demo_card: ModelCard
) -> None:
    """CountTokens, GetModelCard and GetUsage are there too; 0 and false are printed, fields keep the protos' names."""
    async with serve_behind_envoy() as (_, envoy):
        counted = await envoy.post({"prompt": "hi"}, "/llama2.v1.TextGenerationService/CountTokens")
        assert counted.json()["input_tokens"] > 0
        card = await envoy.post({}, "/llama2.v1.ModelService/GetModelCard")
        assert card.json()["model_card"]["name"] == demo_card.name
        usage = await envoy.post({}, "/llama2.v1.AccountService/GetUsage")
        assert usage.json()["account"] == "anonymous"


async def test_the_services_refusals_are_400_with_the_bad_request(serve_behind_envoy: EnvoyMaker) -> None:
    """Every violation of schema and rules arrives with its field, for both output forms; zeros are not lost."""
    async with serve_behind_envoy() as (_, envoy):
        for stream in (False, True):
            refused = await envoy.post({"prompt": "hi", "max_tokens": 0, "top_p": 0, "stream": stream})
            assert violations(refused).keys() == {"max_tokens", "top_p"}
            assert details(refused)["ErrorInfo"]["reason"] == "INVALID_REQUEST"
            assert details(refused)["RequestInfo"]["request_id"]
        long = await envoy.post({"prompt": "x" * 4097})
        assert violations(long) == {"prompt": "must have at most 4096 characters, got 4097"}
        assert violations(await envoy.post({"messages": [{"role": "user"}]})) == {"messages[0].content": "is required"}
        assert violations(await envoy.post({})).keys() == {"prompt"}
        assert violations(await envoy.post("")).keys() == {"prompt"}
        quoted = await envoy.post({"prompt": "hi", "stream": "true"})
        assert violations(quoted).keys() == {"stream"}


WRONG_TYPES = [
    ({"prompt": 5}, "prompt", "must be of type string"),
    ({"prompt": {"hushhush": 1}}, "prompt", "must not be an object"),
    ({"prompt": "hushhush", "max_tokens": "many"}, "max_tokens", "must be of type integer, in 32 bits"),
    ({"prompt": "hushhush", "max_tokens": 2**40}, "max_tokens", "must be of type integer, in 32 bits"),
    ({"prompt": "hushhush", "seed": -1}, "seed", "must be of type integer, not negative, in 64 bits"),
    ({"prompt": "hushhush", "temperature": "hot"}, "temperature", "must be of type number"),
    ({"prompt": "hushhush", "stream": 1}, "stream", "must be of type boolean"),
    ({"messages": "hushhush"}, "messages", "must hold objects"),
    ({"messages": [7]}, "messages[0]", "must hold objects"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "must be of type string"),
    ({"messages": [{"role": "user", "content": {"hushhush": 1}}]}, "messages[0].content", "must not be an object"),
    ({"prompt": ["hushhush"]}, "", None),
    (["hushhush"], "", None),
    ('{"prompt": "hushhush" "hushhush"}', "", None),
    ('{"prompt": "hushhush', "", None),
    ('{"prompt": "hushhush \\ud800"}', "", None),
    ('{"prompt": "hushhush", "temperature": 1e999}', "", None),
]


async def test_what_envoy_cannot_read_is_400_with_a_bad_request_too(serve_behind_envoy: EnvoyMaker) -> None:
    """A value of the wrong type, or a body that is no JSON: the field is named, and nothing of the body is repeated."""
    async with serve_behind_envoy() as (service, envoy):
        for body, field, description in WRONG_TYPES:
            refused = await envoy.post(body)
            ((found, said),) = violations(refused).items()
            assert (found, said) == (field, description or said), body
            assert refused.json()["message"].removeprefix(f"{field}: ") == said
            assert "hushhush" not in refused.text
        assert service.model.prefills == 0
        assert not any("[error]" in line or "hushhush" in line for line in envoy.log)


async def test_keys(serve_behind_envoy: EnvoyMaker, tmp_path: Path) -> None:
    """`Authorization: Bearer KEY` is the service's key; without one 401, with a disabled account's 403."""
    (key, line), (disabled_key, disabled_line) = new_key("alice"), new_key("bob")
    disabled_line = disabled_line.rstrip("}") + ", enabled: false}"
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"keys:\n  {line}\n  {disabled_line}\n")
    async with serve_behind_envoy(accounts=ApiKeyAuthenticator(keys)) as (_, envoy):
        assert (await envoy.post({"prompt": "hi"}, authorization=f"Bearer {key}")).status_code == 200
        for stream in (False, True):
            refused = await envoy.post({"prompt": "hi", "stream": stream})
            assert refused.status_code == 401
            assert details(refused)["ErrorInfo"]["reason"] == "UNAUTHENTICATED"
        disabled = await envoy.post({"prompt": "hi"}, authorization=f"Bearer {disabled_key}")
        assert disabled.status_code == 403


async def test_quota_is_429_with_retry_after(serve_behind_envoy: EnvoyMaker, demo_card: ModelCard) -> None:
    """A used-up quota is 429 with QuotaFailure and RetryInfo, and Retry-After in whole seconds, rounded up."""
    quota = RequestsPerMinute(default=2)
    card = with_config(demo_card, infer_response_cache=None, max_requests_per_min=quota)
    async with serve_behind_envoy(card=card) as (_, envoy):
        for _ in range(2):
            assert (await envoy.post({"prompt": "hi"})).status_code == 200
        for stream in (False, True):
            refused = await envoy.post({"prompt": "hi", "stream": stream})
            assert refused.status_code == 429
            found = details(refused)
            assert found["QuotaFailure"]["violations"][0]["subject"] == "account:anonymous"
            delay = float(found["RetryInfo"]["retry_delay"].removesuffix("s"))
            assert delay <= int(refused.headers["retry-after"]) < delay + 1


async def test_deadline_is_504(serve_behind_envoy: EnvoyMaker) -> None:
    """A caller's `grpc-timeout` header is the call's deadline."""
    async with serve_behind_envoy() as (service, envoy):
        service.model.gate()
        late = await envoy.post({"prompt": "hi"}, **{"grpc-timeout": "50m"})
        assert late.status_code == 504
        assert late.json()["code"] == 4


async def test_a_full_line_is_429(serve_behind_envoy: EnvoyMaker) -> None:
    """A server whose line is full says so and when to come back; that is not tried again behind the caller's back."""
    async with serve_behind_envoy(max_queue_size=0) as (service, envoy):
        service.model.gate()
        holder = asyncio.create_task(envoy.post({"prompt": "hold"}))
        await asyncio.to_thread(service.model.in_step.wait, 10)
        refused = await envoy.post({"prompt": "hi"})
        assert refused.status_code == 429
        assert details(refused)["ErrorInfo"]["reason"] == "QUEUE_FULL"
        assert int(refused.headers["retry-after"]) >= 1
        service.model.open_gate()
        assert (await holder).status_code == 200


async def test_dead_or_draining_servers_are_503(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """Who waits on the only server when it drains gets 503 and Retry-After; so does who comes later; who ran, ran."""
    async with AsyncExitStack() as life:
        service = await life.enter_async_context(serve_scripted(REPLY, max_queue_size=1))
        async with running_envoy(tmp_path, service.address) as envoy:
            service.model.gate()
            runs = asyncio.create_task(envoy.post({"prompt": "runs"}))
            await asyncio.to_thread(service.model.in_step.wait, 10)
            # The line has room for one of two: when the other is refused, it is in.
            callers = {asyncio.create_task(envoy.post({"prompt": "waits"})) for _ in range(2)}
            (full,), (waits,) = await asyncio.wait(callers, return_when=asyncio.FIRST_COMPLETED)
            assert full.result().status_code == 429
            await life.aclose()
            assert (await runs).json()["response"] == REPLY
            later = await envoy.post({"prompt": "later"})
            await until_health_checks_fail(envoy)
            last = await envoy.post({"prompt": "last", "stream": True})
            for refused in (await waits, later, last):
                assert refused.status_code == 503
                assert refused.json()["code"] == 14
                details(refused)
                assert int(refused.headers["retry-after"]) >= 1
            assert last.json()["message"] == "no healthy upstream"


async def until_health_checks_fail(envoy: Envoy, count: int = 1) -> None:
    """Wait until Envoy's own health checks have found so many servers down."""
    async with asyncio.timeout(20):
        down = 0
        while down < count:
            clusters = (await envoy.http.get(f"http://{envoy.admin}/clusters?format=json")).json()
            (cluster,) = clusters["cluster_statuses"]
            hosts = cluster.get("host_statuses", [])
            down = sum(host["health_status"].get("failed_active_health_check", False) for host in hosts)


async def test_other_methods_types_and_paths(serve_behind_envoy: EnvoyMaker) -> None:
    """What is no POST of JSON to a known path is refused in words, before it reaches the service."""
    async with serve_behind_envoy() as (_, envoy):
        got = await envoy.http.get("/v1/generate")
        assert (got.status_code, got.headers["allow"]) == (405, "POST")
        form = await envoy.post({"prompt": "hi"}, **{"content-type": "application/x-www-form-urlencoded"})
        assert form.status_code == 415
        assert "application/json" in form.json()["message"]
        unknown = await envoy.post({"prompt": "hi"}, '/v1/"nothing\\')
        assert unknown.status_code == 404
        assert (await envoy.post({"prompt": "x" * 2_000_000})).status_code == 413
        assert (await envoy.post({"prompt": "hi"}, "/v1/generate?from=here")).status_code == 200
        for refused in (got, form, unknown):
            details(refused)


async def test_grpc_goes_through_as_it_is(serve_behind_envoy: EnvoyMaker) -> None:
    """The Python client works through Envoy, streams and typed refusals included."""
    async with serve_behind_envoy() as (_, envoy), Client(envoy.address) as client:
        assert (await client.generate("hi")).text == REPLY
        async with client.stream("hi") as stream:
            assert "".join([delta async for delta in stream]) == REPLY
        with pytest.raises(InvalidRequest) as refused:
            await client.generate("hi", max_tokens=0)
        assert [violation.field for violation in refused.value.violations] == ["max_tokens"]
        assert await client.health() == "SERVING"


def framed(request: pb.GenerateRequest) -> bytes:
    """A message as gRPC-Web frames it."""
    message = request.SerializeToString()
    return b"\0" + struct.pack(">I", len(message)) + message


def frames(body: bytes) -> tuple[list[bytes], dict[str, str]]:
    """The messages of a gRPC-Web body, and its trailers."""
    messages, trailers = [], b""
    while body:
        flags, length = struct.unpack(">BI", body[:5])
        if flags & 0x80:
            trailers = body[5 : 5 + length]
        else:
            messages.append(body[5 : 5 + length])
        body = body[5 + length :]
    return messages, dict(line.split(":", 1) for line in trailers.decode().split("\r\n") if line)


async def web(envoy: Envoy, method: str, request: pb.GenerateRequest, kind: str) -> httpx2.Response:
    """A gRPC-Web call from a page, over HTTP/1.1."""
    body = framed(request)
    headers = {"content-type": kind, "accept": kind, "x-grpc-web": "1", "origin": PAGE}
    content = base64.b64encode(body) if kind == "application/grpc-web-text" else body
    path = f"/llama2.v1.TextGenerationService/{method}"
    reply = await envoy.http.post(path, content=content, headers=headers)
    assert (reply.http_version, reply.status_code) == ("HTTP/1.1", 200)
    assert reply.headers["access-control-allow-origin"] == PAGE
    return reply


async def test_grpc_web(serve_behind_envoy: EnvoyMaker) -> None:
    """A page calls by gRPC-Web, in binary and in text; status and details of a refusal are open to it."""
    async with serve_behind_envoy() as (_, envoy):
        request = pb.GenerateRequest(prompt="hi")
        whole = await web(envoy, "Generate", request, "application/grpc-web+proto")
        (message,), trailers = frames(whole.content)
        assert pb.GenerateResponse.FromString(message).response == REPLY
        assert trailers["grpc-status"].strip() == "0"
        streamed = await web(envoy, "GenerateStream", request, "application/grpc-web-text")
        messages, trailers = frames(b"".join(map(base64.b64decode, re.findall(r"[^=]+=*", streamed.text))))
        parts = [pb.GenerateStreamResponse.FromString(message) for message in messages]
        assert "".join(part.response for part in parts) == REPLY
        assert parts[-1].HasField("completion")
        refused = await web(envoy, "Generate", pb.GenerateRequest(), "application/grpc-web+proto")
        assert refused.headers["grpc-status"] == "3"
        exposed = refused.headers["access-control-expose-headers"]
        assert {"grpc-status", "grpc-message", "grpc-status-details-bin"} <= set(exposed.split(","))


async def test_cors(serve_behind_envoy: EnvoyMaker) -> None:
    """A browser's question before the call is answered for the page in the configuration, and for no other."""
    async with serve_behind_envoy() as (_, envoy):
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
        for path in ("/v1/generate", GENERATE):
            allowed = await envoy.http.options(path, headers=asks | {"origin": PAGE})
            assert allowed.status_code == 200
            assert allowed.headers["access-control-allow-origin"] == PAGE
            assert "authorization" in allowed.headers["access-control-allow-headers"]
            other = await envoy.http.options(path, headers=asks | {"origin": "http://elsewhere.example"})
            assert "access-control-allow-origin" not in other.headers
        for body in ({"prompt": "hi"}, {"prompt": 5}, {"prompt": "hi", "stream": True}):
            assert (await envoy.post(body, origin=PAGE)).headers["access-control-allow-origin"] == PAGE
            reply = await envoy.post(body, origin="http://elsewhere.example")
            assert "access-control-allow-origin" not in reply.headers


async def held_on_each(
    envoy: Envoy, services: list[Service], calls: int | None = None
) -> list["asyncio.Task[httpx2.Response]"]:
    """Calls that are held in their first step, each on a server of its own; every model waits from now on."""
    for service in services:
        service.model.gate()
    held = []
    for count in range(1, (calls or len(services)) + 1):
        held.append(asyncio.create_task(envoy.post({"prompt": "long", "stream": count > 1})))
        async with asyncio.timeout(20):
            while sum(service.model.in_step.is_set() for service in services) < count:
                await asyncio.sleep(0)
    return held


async def until_sent(envoy: Envoy, count: int) -> None:
    """Wait until Envoy has so many calls under way to servers."""
    async with asyncio.timeout(20):
        while True:
            stats = (
                await envoy.http.get(f"http://{envoy.admin}/stats?filter=^cluster.llama2.upstream_rq_active$")
            ).text
            if int(stats.rpartition(":")[2]) == count:
                return


@needs_one_port_hosts
async def test_calls_go_to_the_server_with_the_fewest(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """Of three servers behind one name two are held by long calls: all others go to the third."""
    async with three_services(serve_scripted, tmp_path) as services:
        with running_name_server(*ONE_PORT_HOSTS) as names:
            async with running_envoy(tmp_path, services[0].address, names) as envoy:
                held = await held_on_each(envoy, services, calls=2)
                (idle,) = [service for service in services if not service.model.in_step.is_set()]
                idle.model.open_gate()
                for _ in range(6):
                    assert (await envoy.post({"prompt": "short"})).status_code == 200
                assert idle.model.prefills == sum(prefills(services)) == 6
                for service in services:
                    service.model.open_gate()
                assert [reply.status_code for reply in await asyncio.gather(*held)] == [200, 200]


@needs_one_port_hosts
async def test_a_dead_server_is_routed_around(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """When one of two servers ends no call fails: at first by retries, then because health checks leave it out."""
    async with AsyncExitStack() as life, AsyncExitStack() as stack:
        first = await life.enter_async_context(
            serve_scripted(data_directory=tmp_path / "first", shutdown_grace_seconds=0)
        )
        host = ONE_PORT_HOSTS[1]
        started = serve_scripted(listen=f"{host}:{first.port}", data_directory=tmp_path / "second")
        second = await stack.enter_async_context(started)
        names = stack.enter_context(running_name_server(*ONE_PORT_HOSTS[:2]))
        envoy = await stack.enter_async_context(running_envoy(tmp_path, first.address, names))

        async def all_succeed() -> None:
            replies = await asyncio.gather(
                *(envoy.post({"prompt": "hi", "stream": index % 2 > 0}) for index in range(8))
            )
            assert {reply.status_code for reply in replies} == {200}

        async with asyncio.timeout(20):
            while not all(prefills([first, second])):  # among idle servers Envoy picks at random
                await all_succeed()
        await life.aclose()
        await all_succeed()
        await until_health_checks_fail(envoy)
        await all_succeed()
        assert sum(prefills([first, second])) == 24


class Wire:
    """A TCP forwarder that can be cut, which ends a server for its callers as a crash would."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._writers: list[asyncio.StreamWriter] = []
        self._pipes: set[asyncio.Task[None]] = set()

    async def listen(self, host: str, port: int) -> None:
        self._server = await asyncio.start_server(self._connect, host, port)

    async def cut(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._pipes)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._to)
        self._writers += [writer, far_writer]
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._pipes.add(asyncio.create_task(self._pipe(source, sink)))

    async def _pipe(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()


@needs_one_port_hosts
async def test_a_call_on_a_server_that_crashes_is_made_again_on_another(
    serve_scripted: ServiceMaker, tmp_path: Path
) -> None:
    """A server that goes while calls run there, of which nothing was sent yet: they are answered by another one."""
    async with AsyncExitStack() as stack:
        healthy = await stack.enter_async_context(serve_scripted(REPLY, data_directory=tmp_path / "healthy"))
        crashing = await stack.enter_async_context(serve_scripted(REPLY, data_directory=tmp_path / "crashing"))
        wire = Wire("127.0.0.1", crashing.port)
        await wire.listen(ONE_PORT_HOSTS[1], healthy.port)
        names = stack.enter_context(running_name_server(*ONE_PORT_HOSTS[:2]))
        envoy = await stack.enter_async_context(running_envoy(tmp_path, healthy.address, names))
        calls = await held_on_each(envoy, [healthy, crashing])
        await wire.cut()
        healthy.model.open_gate()
        assert {reply.status_code for reply in await asyncio.gather(*calls)} == {200}
        assert healthy.model.prefills == 2


@needs_one_port_hosts
async def test_who_waits_on_a_draining_server_moves_to_another(serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """A call that a draining server refuses while it waits in line is served by another one; its caller sees 200."""
    async with AsyncExitStack() as life, AsyncExitStack() as stack:
        first = await life.enter_async_context(serve_scripted(REPLY, data_directory=tmp_path / "first"))
        host = ONE_PORT_HOSTS[1]
        started = serve_scripted(REPLY, listen=f"{host}:{first.port}", data_directory=tmp_path / "second")
        second = await stack.enter_async_context(started)
        names = stack.enter_context(running_name_server(*ONE_PORT_HOSTS[:2]))
        envoy = await stack.enter_async_context(running_envoy(tmp_path, first.address, names))
        calls = await held_on_each(envoy, [first, second])
        calls += [asyncio.create_task(envoy.post({"prompt": "waits"})) for _ in range(4)]
        await until_sent(envoy, 6)
        await life.aclose()
        second.model.open_gate()
        assert {reply.status_code for reply in await asyncio.gather(*calls)} == {200}


def blocks(language: str) -> list[str]:
    """The README's blocks in a language."""
    readme = (EXAMPLE / "README.md").read_text()
    return [textwrap.dedent(block) for block in re.findall(rf"(?ms)^ *```{language}\n(.*?)^ *```", readme)]


def test_the_readmes_commands_make_and_check_the_configuration(tmp_path: Path) -> None:
    """`python descriptors.py llama2.pb` and `envoy -c envoy.yaml`, word for word, on the files as they ship."""
    envoy = Path(envoy_command())
    copy = Path(shutil.copytree(EXAMPLE, tmp_path / "envoy", ignore=shutil.ignore_patterns("*.pb")))
    path = f"{Path(sys.executable).parent}:{envoy.parent}:{os.environ['PATH']}"
    lines = [line.partition("#")[0].strip() for line in blocks("sh")[0].splitlines()]
    (make,) = [line for line in lines if line.startswith("python ")]
    (run,) = [line for line in lines if line.startswith("envoy ")]
    assert make.split()[1:] == DESCRIPTORS
    for command in (make, f"{run} --mode validate"):
        done = subprocess.run(
            command.split(), cwd=copy, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert "configuration 'envoy.yaml' OK" in done.stdout + done.stderr


async def test_the_readmes_curl_commands(serve_behind_envoy: EnvoyMaker) -> None:
    """Each curl command of the README, sent as curl would, is answered."""
    commands = [shlex.split(line) for line in blocks("sh")[1].splitlines()]
    assert len(commands) > 4
    async with serve_behind_envoy() as (_, envoy):
        for curl, url, flag, body, *rest in commands:
            assert (curl, flag) == ("curl", "--json")
            headers = dict(word.split(": ") for word in rest if ": " in word)
            headers = {key: value.encode("ascii", "ignore").decode() for key, value in headers.items()}
            reply = await envoy.post(body, url.removeprefix("http://127.0.0.1:8080"), **headers)
            assert reply.status_code == 200, reply.text
            streamed = json.loads(body).get("stream", False)
            assert reply.headers["content-type"] == ("text/event-stream" if streamed else "application/json")


async def test_the_readmes_tls(serve_scripted: ServiceMaker, tmp_path: Path, authority: Authority) -> None:
    """With the README's `transport_socket` the same port serves HTTPS and gRPC over TLS."""
    certificate, key = authority.pair()
    (block,) = blocks("yaml")
    tls = block.replace("tls.crt", str(certificate)).replace("tls.key", str(key))
    async with (
        serve_scripted(REPLY) as service,
        running_envoy(tmp_path, service.address, filter_chain=yaml.safe_load(tls)) as envoy,
        httpx2.AsyncClient(verify=ssl.create_default_context(cafile=authority.root_file()), trust_env=False) as https,
        Client(envoy.address, tls=authority.root) as client,
    ):
        reply = await https.post(f"https://{envoy.address}/v1/generate", json={"prompt": "hi"})
        assert reply.json()["response"] == REPLY
        assert (await client.generate("hi")).text == REPLY


KINDER = [
    {"prompt": "hi", "unknown": {"a": [1]}},
    {"prompt": "hi", "maxTokens": 1},
    {"prompt": "hi", "stream": None, "max_tokens": None},
    {"prompt": "hi", "raw": "yes"},
    {"prompt": "hi", "max_tokens": "5"},
    {"prompt": "hi", "stop": "!"},
]


async def test_where_envoy_is_kinder_than_the_schema(serve_behind_envoy: EnvoyMaker) -> None:
    """What protobuf's JSON reader accepts beyond the card's schema, by the README; `maxTokens` is `max_tokens`."""
    async with serve_behind_envoy() as (_, envoy):
        for body in KINDER:
            assert (await envoy.post(body)).status_code == 200, body
        short = await envoy.post({"prompt": "hi", "maxTokens": 1})
        assert short.json()["completion"]["finish_reason"] == "FINISH_REASON_MAX_TOKENS"
