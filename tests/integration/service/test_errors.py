"""Errors over a real socket: invalid requests, malformed messages, unknown methods and failures of the server."""

from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from tests.support.faults import FaultPoint
from tests.support.service import ServiceMaker, details, generate

from llama2.v1 import text_generation_pb2 as pb
from llama2_server.admission.call_budget import CallBudget
from llama2_server.api.validation.card_schema import MAX_VIOLATIONS
from llama2_server.engine.engine import Engine

REPLY = "Once upon a time, a fox 🦊 lived by the sea."
METHOD = "/llama2.v1.TextGenerationService/"


async def test_violations_are_listed(serve_scripted: ServiceMaker) -> None:
    """INVALID_ARGUMENT has a BadRequest with every violation, and the model does not run."""
    async with serve_scripted() as service:
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await service.text.Generate(pb.GenerateRequest(prompt="x" * 5000, top_p=3))
        assert rejected.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        bad_request = details(rejected.value)["BadRequest"]
        assert isinstance(bad_request, error_details_pb2.BadRequest)
        assert [violation.field for violation in bad_request.field_violations] == ["prompt", "top_p"]
        assert service.model.prefills == 0


async def test_many_violations_fit_the_trailers(serve_scripted: ServiceMaker) -> None:
    """A long list of violations is cut to the size of the trailers, and ends with the number of the others."""
    async with serve_scripted() as service:
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await service.text.Generate(
                pb.GenerateRequest(messages=[pb.ChatMessage(role="user", content="[INST]")] * 100)
            )
        bad_request = details(rejected.value)["BadRequest"]
        assert isinstance(bad_request, error_details_pb2.BadRequest)
        listed = bad_request.field_violations
        others = MAX_VIOLATIONS + 1 - (len(listed) - 1)
        assert listed[-1].description == f"at least {others} more violations are not listed"


async def test_count_tokens_rejects_invalid_requests(serve_scripted: ServiceMaker) -> None:
    """CountTokens applies the same rules to its request."""
    async with serve_scripted() as service:
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await service.text.CountTokens(pb.CountTokensRequest())
        assert rejected.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("method", ["Generate", "CountTokens"])
async def test_malformed_bytes_are_an_invalid_argument(serve_scripted: ServiceMaker, method: str) -> None:
    """Bytes that do not parse get INVALID_ARGUMENT, not UNKNOWN with the parser's text."""
    async with serve_scripted() as service:
        call: Any = service.channel.unary_unary(METHOD + method, None, None)
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await call(b"\xff\xff\xff")
        assert rejected.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "BadRequest" in details(rejected.value)


async def test_malformed_bytes_on_the_stream(serve_scripted: ServiceMaker) -> None:
    """A string that is not UTF-8 is malformed too, also for GenerateStream."""
    async with serve_scripted() as service:
        call: Any = service.channel.unary_stream(METHOD + "GenerateStream", None, None)
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await call(b"\x0a\x02\xff\xfe").read()
        assert rejected.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "CountTokens"])
async def test_a_fault_before_the_message_is_read_is_internal(
    serve_scripted: ServiceMaker, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A fault in the interceptor gets INTERNAL without its text, not UNKNOWN with it."""
    FaultPoint(monkeypatch, CallBudget, "check").arm()
    async with serve_scripted() as service:
        call: Any = service.channel.unary_unary(METHOD + method, None, None)
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await call(pb.GenerateRequest(prompt="x").SerializeToString())
        assert rejected.value.code() is grpc.StatusCode.INTERNAL
        assert "check" not in str(rejected.value.details())


async def test_unknown_method_is_unimplemented(serve_scripted: ServiceMaker) -> None:
    """A call of an unknown method gets UNIMPLEMENTED."""
    async with serve_scripted() as service:
        call: Any = service.channel.unary_unary(METHOD + "Guess", None, None)
        with pytest.raises(grpc.aio.AioRpcError) as rejected:
            await call(b"")
        assert rejected.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_engine_error_is_internal_without_its_text(serve_scripted: ServiceMaker) -> None:
    """An engine error is INTERNAL with a RequestInfo, without the exception's text; the next call succeeds."""
    async with serve_scripted(REPLY) as service:
        service.model.failure = RuntimeError("a secret")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await service.text.Generate(pb.GenerateRequest(prompt="a"))
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in repr(failed.value)
        info = details(failed.value)["RequestInfo"]
        assert isinstance(info, error_details_pb2.RequestInfo)
        assert info.request_id
        service.model.failure = None
        assert (await service.text.Generate(pb.GenerateRequest(prompt="a"))).response == REPLY


async def test_unexpected_exception_is_internal(serve_scripted: ServiceMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected exception outside the engine ends the call with the same message and frees the slot."""
    async with serve_scripted(REPLY) as service:
        with monkeypatch.context() as patched:
            patched.setattr(Engine, "submit", lambda *_: 1 / 0)
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await service.text.Generate(pb.GenerateRequest(prompt="a story"), timeout=60)
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        assert failed.value.details() == "internal error; report the request id to the operator"
        assert (await generate(service, "next", 2)).completion.usage.output_tokens == 2


async def test_no_prompt_reply_or_key_is_logged(
    serve_scripted: ServiceMaker, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """No log record at any level and no error contains a prompt, a reply or a key."""
    key = "l2_plainly-not-a-known-key"
    credentials = (("authorization", f"Bearer {key}"),)
    prompt, reply = "xylophone", "marmalade"
    errors = []
    with caplog.at_level(1):
        async with serve_scripted(f"{reply} {reply}") as service:
            good = pb.GenerateRequest(prompt=prompt)
            await service.text.Generate(good, metadata=credentials)
            service.model.failure = RuntimeError("broken")
            for request in (
                good,
                pb.GenerateRequest(prompt=prompt, max_tokens=10**6, stop=[prompt] * 9, top_p=7),
                pb.GenerateRequest(messages=[pb.ChatMessage(role=prompt, content=prompt)]),
                pb.GenerateRequest(prompt=f"{prompt} " * 2000),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as rejected:
                    await service.text.Generate(request, metadata=credentials)
                errors.append(f"{rejected.value.details()} {dict(rejected.value.trailing_metadata() or ())}")
    texts = [*caplog.messages, caplog.text, *capfd.readouterr(), *errors]
    assert len(caplog.messages) > 1
    for secret in (prompt, reply, key):
        assert not [text for text in texts if secret in text]
