"""`examples/envoy` with a real Envoy: gRPC, gRPC-Web and CORS."""

import base64
import re
import struct

import httpx2
import pytest
from tests.integration.examples.conftest import REPLY, EnvoyMaker
from tests.support.servers.envoy_server import Envoy

from llama2.v1 import text_generation_pb2 as pb
from llama2_client import Client
from llama2_client.errors import InvalidRequest

GENERATE = "/llama2.v1.TextGenerationService/Generate"
PAGE = "http://localhost:3000"  # the web page that the example's CORS policy allows


async def test_grpc_passes_unchanged(serve_behind_envoy: EnvoyMaker) -> None:
    """The Python client works through Envoy, with streams and typed errors."""
    async with serve_behind_envoy() as (_, envoy), Client(envoy.address) as client:
        assert (await client.generate("hi")).text == REPLY
        async with client.stream("hi") as stream:
            assert "".join([delta async for delta in stream]) == REPLY
        with pytest.raises(InvalidRequest) as error:
            await client.generate("hi", max_tokens=0)
        assert [violation.field for violation in error.value.violations] == ["max_tokens"]
        assert await client.health() == "SERVING"


def frame(request: pb.GenerateRequest) -> bytes:
    """Frame a message for gRPC-Web."""
    message = request.SerializeToString()
    return b"\0" + struct.pack(">I", len(message)) + message


def parse_frames(body: bytes) -> tuple[list[bytes], dict[str, str]]:
    """Return the messages of a gRPC-Web body, and its trailers."""
    messages, trailers = [], b""
    while body:
        flags, length = struct.unpack(">BI", body[:5])
        if flags & 0x80:
            trailers = body[5 : 5 + length]
        else:
            messages.append(body[5 : 5 + length])
        body = body[5 + length :]
    return messages, dict(line.split(":", 1) for line in trailers.decode().split("\r\n") if line)


async def call_grpc_web(envoy: Envoy, method: str, request: pb.GenerateRequest, kind: str) -> httpx2.Response:
    """Call by gRPC-Web from a web page, over HTTP/1.1."""
    body = frame(request)
    headers = {"content-type": kind, "accept": kind, "x-grpc-web": "1", "origin": PAGE}
    content = base64.b64encode(body) if kind == "application/grpc-web-text" else body
    path = f"/llama2.v1.TextGenerationService/{method}"
    reply = await envoy.http.post(path, content=content, headers=headers)
    assert (reply.http_version, reply.status_code) == ("HTTP/1.1", 200)
    assert reply.headers["access-control-allow-origin"] == PAGE
    return reply


async def test_grpc_web_in_binary_and_text(serve_behind_envoy: EnvoyMaker) -> None:
    """A web page calls by gRPC-Web in binary and text, and can read the status and details of an error."""
    async with serve_behind_envoy() as (_, envoy):
        request = pb.GenerateRequest(prompt="hi")
        whole = await call_grpc_web(envoy, "Generate", request, "application/grpc-web+proto")
        (message,), trailers = parse_frames(whole.content)
        assert pb.GenerateResponse.FromString(message).response == REPLY
        assert trailers["grpc-status"].strip() == "0"
        streamed = await call_grpc_web(envoy, "GenerateStream", request, "application/grpc-web-text")
        messages, trailers = parse_frames(b"".join(map(base64.b64decode, re.findall(r"[^=]+=*", streamed.text))))
        parts = [pb.GenerateStreamResponse.FromString(message) for message in messages]
        assert "".join(part.response for part in parts) == REPLY
        assert parts[-1].HasField("completion")
        rejected = await call_grpc_web(envoy, "Generate", pb.GenerateRequest(), "application/grpc-web+proto")
        assert rejected.headers["grpc-status"] == "3"
        exposed = rejected.headers["access-control-expose-headers"]
        assert {"grpc-status", "grpc-message", "grpc-status-details-bin"} <= set(exposed.split(","))


async def test_cors_allows_the_configured_page_only(serve_behind_envoy: EnvoyMaker) -> None:
    """Preflight requests succeed for the page in the configuration, and for no other page."""
    async with serve_behind_envoy() as (_, envoy):
        preflight = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        for path in ("/v1/generate", GENERATE):
            allowed = await envoy.http.options(path, headers=preflight | {"origin": PAGE})
            assert allowed.status_code == 200
            assert allowed.headers["access-control-allow-origin"] == PAGE
            assert "authorization" in allowed.headers["access-control-allow-headers"]
            other = await envoy.http.options(path, headers=preflight | {"origin": "http://elsewhere.example"})
            assert "access-control-allow-origin" not in other.headers
        for body in ({"prompt": "hi"}, {"prompt": 5}, {"prompt": "hi", "stream": True}):
            assert (await envoy.post(body, origin=PAGE)).headers["access-control-allow-origin"] == PAGE
            reply = await envoy.post(body, origin="http://elsewhere.example")
            assert "access-control-allow-origin" not in reply.headers
