"""Prompts, replies, stop sequences and keys appear only in the reply itself, for every kind of error."""

import asyncio
import io
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from prometheus_client import generate_latest
from tests.integration.telemetry.conftest import Watched
from tests.support.deadlines import CallDeadlines, server_deadline
from tests.support.service import Service, ServiceMaker, disconnect, with_config

from llama2.v1 import account_pb2, account_pb2_grpc
from llama2.v1 import text_generation_pb2 as pb
from llama2_server.admission.accounts import ApiKeyAuthenticator
from llama2_server.admission.keys.keys_file import new_key
from llama2_server.api.completion import Completions
from llama2_server.card import ModelCard, RequestsPerMinute
from llama2_server.generation.generation import Generation
from llama2_server.generation.text_stream import TextStream
from llama2_server.telemetry import logging as logs

pytestmark = pytest.mark.usefixtures("logging_restored")

PROMPT = "prompt-5f1e"
STOP = "stop-77ab"
REPLY = "reply-c0de"
METADATA = "metadata-91d3"
SERVICE = "llama2.v1.TextGenerationService"
QUOTED = f"{PROMPT} {STOP} {REPLY}"  # a possible message of an exception


def with_key(key: str) -> tuple[tuple[str, str], ...]:
    others = ((name, METADATA) for name in ("x-note", "traceparent", "tracestate", "baggage"))
    return (("authorization", f"Bearer {key}"), *others)


class Client:
    """A client with secrets in every input; it collects the statuses of its calls."""

    def __init__(self, service: Service, key: str, wrong_key: str) -> None:
        self.service = service
        self.metadata = with_key(key)
        self.wrong_key = wrong_key
        self.statuses: list[str] = []

    async def fails(self, call: Awaitable[Any], code: grpc.StatusCode) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() is code
        status = error.value
        self.statuses.append(f"{status.details()} {status.initial_metadata()} {status.trailing_metadata()}")

    async def generate(self, code: grpc.StatusCode = grpc.StatusCode.OK, **fields: Any) -> None:
        fields = {"prompt": PROMPT, "stop": [STOP]} | fields
        call = self.service.text.Generate(pb.GenerateRequest(**fields), metadata=self.metadata)
        if code is grpc.StatusCode.OK:
            assert (await call).response == REPLY
        else:
            await self.fails(call, code)

    async def succeed(self) -> None:
        """Generate, read from the cache, stream, count tokens and get usage."""
        await self.generate()
        await self.generate()
        stream = self.service.text.GenerateStream(pb.GenerateRequest(prompt=f"{PROMPT}!"), metadata=self.metadata)
        assert REPLY in "".join([part.response async for part in stream])
        await self.service.text.CountTokens(pb.CountTokensRequest(prompt=PROMPT), metadata=self.metadata)
        usage = account_pb2_grpc.AccountServiceStub(self.service.channel)
        await usage.GetUsage(account_pb2.GetUsageRequest(), metadata=self.metadata)

    async def send_invalid_calls(self) -> None:
        """Send invalid fields, malformed bytes, invalid keys and unknown methods."""
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        await self.generate(invalid, prompt=PROMPT * 1000)
        await self.generate(invalid, stop=[f"{STOP}{number}" for number in range(9)])
        await self.generate(invalid, stop=[STOP * 1000])
        await self.generate(invalid, top_p=3, temperature=-1, max_tokens=10**6)
        await self.generate(invalid, prompt=None, messages=[pb.ChatMessage(role=PROMPT, content=PROMPT)])
        await self.generate(invalid, prompt=None, messages=[pb.ChatMessage(role="user", content=PROMPT * 1000)])
        await self.fails(self.raw("Generate", b"\xff" + PROMPT.encode()), invalid)
        await self.fails(self.raw(PROMPT, b""), grpc.StatusCode.UNIMPLEMENTED)
        for key in (self.wrong_key, self.wrong_key * 20):
            call = self.service.text.Generate(pb.GenerateRequest(prompt=PROMPT), metadata=with_key(key))
            await self.fails(call, grpc.StatusCode.UNAUTHENTICATED)

    async def leave_early(self, deadlines: CallDeadlines) -> None:
        """Let one call's deadline pass during generation, and cancel another call."""
        request = pb.GenerateRequest(prompt=f"{PROMPT}?", stop=[STOP])
        self.service.model.gate()
        late = self.service.text.Generate(request, metadata=(*self.metadata, *server_deadline()))
        await self.service.wait_until_in_step()
        deadlines.expire()
        await self.fails(late, grpc.StatusCode.DEADLINE_EXCEEDED)
        self.service.model.open_gate()
        await self.generate(prompt=f"{PROMPT} once more")  # waits until the slot is free
        self.service.model.gate()
        self.service.model.allow(1)
        call: Any = self.service.text.GenerateStream(request, metadata=self.metadata)
        await call.read()
        await disconnect(self.service, call)
        self.service.model.open_gate()

    async def fail_in_the_server(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Fail in the model, the token sink, the handler and a callback, with exceptions that quote the request."""
        internal = grpc.StatusCode.INTERNAL
        self.service.model.failure = quoting()
        await self.generate(internal, prompt=f"{PROMPT} 1")
        self.service.model.failure = None
        with monkeypatch.context() as patch:
            patch.setattr(TextStream, "on_token", raise_quoting)
            await self.generate(internal, prompt=f"{PROMPT} 2")
        with monkeypatch.context() as patch:
            patch.setattr(Completions, "of", raise_quoting)
            await self.generate(internal, prompt=f"{PROMPT} 3")
        with monkeypatch.context() as patch:
            patch.setattr(Generation, "add_text", raise_quoting)
            await self.service.text.Generate(pb.GenerateRequest(prompt=f"{PROMPT} 4"), metadata=self.metadata)

    async def raw(self, method: str, message: bytes) -> None:
        call: Any = self.service.channel.unary_unary(f"/{SERVICE}/{method}")
        await call(message, metadata=self.metadata)


def quoting() -> Exception:
    """Return an exception with secrets in each of its parts."""
    error = ExceptionGroup(QUOTED, [ValueError(QUOTED), KeyError(QUOTED)])
    error.__cause__ = RuntimeError(QUOTED)
    error.add_note(QUOTED)
    return error


def raise_quoting(*_: object) -> Any:
    raise quoting()


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_nothing_leaks(
    serve_scripted: ServiceMaker,
    demo_card: ModelCard,
    watched: Watched,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    deadlines: CallDeadlines,
    capfd: pytest.CaptureFixture[str],
    log_format: Any,
) -> None:
    """At level debug, no secret is in logs, traces, metrics, the ledger or a status."""
    stream = io.StringIO()
    logs.configure("debug", log_format, stream)
    asyncio.get_running_loop().set_exception_handler(logs.on_loop_exception)
    (key, line), (wrong_key, _) = new_key("tester"), new_key("stranger")
    (tmp_path / "keys.yaml").write_text(f"keys:\n  {line}\n")
    card = with_config(demo_card, max_requests_per_min=RequestsPerMinute(default=10**6))
    accounts = ApiKeyAuthenticator(tmp_path / "keys.yaml")
    data = tmp_path / "data"
    async with serve_scripted(
        REPLY, card=card, accounts=accounts, telemetry=watched.telemetry, data_directory=data
    ) as service:
        client = Client(service, key, wrong_key)
        await client.succeed()
        await client.send_invalid_calls()
        await client.leave_early(deadlines)
        await client.fail_in_the_server(monkeypatch)
        scrape = generate_latest(watched.telemetry.metrics.registry).decode()
        files = b"".join(file.read_bytes() for file in data.rglob("*") if file.is_file())
    spans = watched.exporter.get_finished_spans()
    outputs = {
        "log": stream.getvalue(),
        "stdout and stderr": "".join(capfd.readouterr()),
        "spans": "".join(span.to_json() for span in spans),
        "metrics": scrape,
        "statuses": "".join(client.statuses),
        "files": files.decode(errors="replace"),
    }
    secrets = {PROMPT, STOP, REPLY, METADATA, key, key.split("_", 2)[2], wrong_key.split("_", 2)[2]}
    assert [(name, secret) for name, text in outputs.items() for secret in secrets if secret in text] == []
    # The test itself works: every output exists and describes the calls.
    assert outputs["log"].count("ExceptionGroup") >= 4
    assert all(f"{SERVICE}/Generate" in outputs[name] for name in ("log", "spans", "metrics"))
    assert "tester" in outputs["files"]
    assert len(client.statuses) == 14
