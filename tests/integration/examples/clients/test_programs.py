"""The chat programs of `examples/clients` against the service and against a server that sends scripted errors."""

import asyncio
import socket
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from tests.integration.examples.clients.client_program import ClientProgram
from tests.integration.service.conftest import records
from tests.support.processes import free_port
from tests.support.scripted_server import ScriptedServer
from tests.support.servers.cutting_proxy import CuttingProxy
from tests.support.service import ServiceMaker, until

from llama2.v1 import text_generation_pb2 as pb

# The fixture builds the program within the first test's time.
pytestmark = pytest.mark.timeout(300)
REPLY = "Once upon a time."
LONG_REPLY = "Once upon a time, a fox lived by the sea and told the gulls what it had seen."


async def test_a_chat_streams(program: ClientProgram, serve_scripted: ServiceMaker) -> None:
    """The program prints the first piece while the model waits before the next token; the input's end ends it."""
    async with serve_scripted(REPLY) as service, program.running(service.address) as running:
        service.model.gate()
        service.model.allow(1)
        running.send("Hello")
        await running.wait_for_output(REPLY[0])
        service.model.open_gate()
        output, errors = await running.finish()
        assert output.endswith("time.\n")
        assert errors == ""
        assert await program.chat(service.address, "Hello", "Tell me more") == (f"{REPLY}\n{REPLY}\n", "")


async def test_a_rejected_request_prints_each_field(program: ClientProgram, serve_scripted: ServiceMaker) -> None:
    """Each violation of BadRequest is one line with its field, and the program reads the next message."""
    async with serve_scripted(REPLY) as service:
        output, errors = await program.chat(service.address, "[INST]", "again", arguments=("'<<SYS>>'",))
    assert output == ""
    assert "  messages[0].content: must not contain" in errors
    assert "  messages[1].content: must not contain" in errors
    assert errors.count("  messages[0].content: ") == 2
    assert errors.count("  messages[1].content: ") == 1


async def test_ctrl_c_frees_the_slot(program: ClientProgram, serve_scripted: ServiceMaker) -> None:
    """SIGINT cancels a reply without an end, and the call that waits for the slot gets it."""
    async with serve_scripted("word " * 800, ends=False) as service, program.running(service.address) as running:
        service.model.gate()
        service.model.allow(1)
        running.send("hold")
        await running.wait_for_output("w")
        waiting = service.text.GenerateStream(pb.GenerateRequest(prompt="wait", max_tokens=5))
        await service.wait_until_queued(1)
        running.interrupt()
        await until(lambda: service.finished_calls("CANCELLED") == 1)
        assert service.model.prefills == 1
        service.model.open_gate()
        assert [message async for message in waiting][-1].completion.usage.output_tokens == 5
        assert service.model.prefills == 2


async def test_a_restart_is_retried(program: ClientProgram, serve_scripted: ServiceMaker) -> None:
    """A message that is sent while the server is down gets its reply from the next server on the port."""
    address = f"127.0.0.1:{free_port()}"
    async with program.running(address) as running:
        async with serve_scripted(REPLY, listen=address):
            running.send("first")
            await running.wait_for_output(f"{REPLY}\n")
        tried = asyncio.Event()
        down = await _refuse(address, tried)
        running.send("second")
        await tried.wait()
        down.close()
        await down.wait_closed()
        async with serve_scripted(REPLY, listen=address):
            await running.wait_for_output(f"{REPLY}\n")
            await running.finish()


async def _refuse(address: str, tried: asyncio.Event) -> asyncio.Server:
    """Listen where no gRPC server is: close each connection, and set `tried` at the first one."""

    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tried.set()
        writer.close()

    host, _, port = address.rpartition(":")
    return await asyncio.start_server(close, host, int(port), family=socket.AF_INET, reuse_port=True)


async def test_key_deadline_and_conversation(program: ClientProgram) -> None:
    """Each call has the key and a deadline, and the messages are the conversation so far."""
    async with ScriptedServer.running() as server:
        server.script_reply("Hel", "lo.")
        arguments, key = ("'Be brief.'",), "l2_secret"
        output, _ = await program.chat(server.address, "one", "two", arguments=arguments, LLAMA2_API_KEY=key)
        assert output == "Hello.\nHello.\n"
        assert [headers["authorization"] for headers in server.metadata] == [f"Bearer {key}"] * 2
        # gRPC's C library rounds a deadline of 120 s up to 121 s when it has to write it in milliseconds.
        assert all(seconds is not None and 100 < seconds <= 121 for seconds in server.remaining_seconds)
        conversation = [("system", "Be brief."), ("user", "one"), ("assistant", "Hello."), ("user", "two")]
        assert [_turns(request) for request in server.requests] == [conversation[:2], conversation]


async def test_retry_info_is_respected(program: ClientProgram) -> None:
    """A rejected call is repeated once the delay of its RetryInfo has passed, not earlier."""
    delay = Duration(nanos=700_000_000)
    times = []
    async with ScriptedServer.running() as server:
        retry_info = error_details_pb2.RetryInfo(retry_delay=delay)
        server.script_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "quota", retry_info)
        server.script_reply("Hello.")
        async with program.running(server.address) as running:
            running.send("one")
            for calls in (1, 2):
                await until(lambda calls=calls: len(server.requests) == calls, 60)  # type: ignore[misc]
                times.append(asyncio.get_running_loop().time())
            output, errors = await running.finish()
    assert output == "Hello.\n"
    assert "quota; retrying in 0.7 s" in errors
    assert times[1] - times[0] > 0.6


async def test_grpc_retries_by_the_service_config(program: ClientProgram) -> None:
    """UNAVAILABLE before the first message is retried by gRPC or Envoy; the program would print its own retry."""
    async with ScriptedServer.running() as server:
        server.script_error(grpc.StatusCode.UNAVAILABLE, "restarting")
        server.script_reply("Hello.")
        assert await program.chat(server.address, "one") == ("Hello.\n", "")
        assert [headers.get("grpc-previous-rpc-attempts") for headers in server.metadata] == [None, program.attempts]


@pytest.mark.parametrize("code", [None, grpc.StatusCode.INTERNAL])
async def test_a_reply_without_completion_is_not_whole(program: ClientProgram, code: grpc.StatusCode | None) -> None:
    """A stream that fails, or ends without `completion`, is reported, and does not enter the conversation."""
    async with ScriptedServer.running() as server:
        if code is None:
            server.script_reply("Hel", completion=None)
        else:
            server.script_error(code, "gone", after=("Hel",))
        server.script_reply("Hello.")
        output, errors = await program.chat(server.address, "one", "two")
        assert output == "HelHello.\n"
        assert "incomplete: " in errors
        assert [_turns(request) for request in server.requests] == [[("user", "one")], [("user", "two")]]


async def test_a_broken_stream(program: ClientProgram, serve_scripted: ServiceMaker, tmp_path: Path) -> None:
    """After its connection broke, a program with keys prints the rest of the text; the others report it."""
    async with (
        serve_scripted(LONG_REPLY) as service,
        CuttingProxy.running(lambda: service.address) as proxy,
        program.running(proxy.address) as running,
    ):
        service.model.gate()
        service.model.allow(4)
        running.send("Tell me a story")
        await running.wait_for_output("Once upon")
        await service.wait_until_in_step()
        proxy.cut()
        if program.resumes:
            await until(lambda: proxy.connections > 1, 60)
        service.model.open_gate()
        output, errors = await running.finish()
    first, *_ = records(tmp_path)
    if program.resumes:
        assert f"Once upon{output}" == f"{LONG_REPLY}\n"
        assert "broken: " in errors
        assert (first["outcome"], len(list(records(tmp_path)))) == ("END_OF_SEQUENCE", 1)
    else:
        assert f"Once upon{output}".strip() in LONG_REPLY
        assert "incomplete: " in errors


async def test_keys_of_attempts(program: ClientProgram) -> None:
    """Each message has a new key, which all its attempts share; the resumed attempt continues after the text."""
    async with ScriptedServer.running() as server:
        server.script_error(grpc.StatusCode.UNAVAILABLE, "gone", after=("H🦊",))
        server.script_reply("llo.")
        output, errors = await program.chat(server.address, "one", "two")
        if not program.resumes:
            assert "incomplete: " in errors
            assert server.keys == ["", ""]
            return
        assert output == "H🦊llo.\nllo.\n"
        first, again, second = server.keys
        assert first == again != second
        assert [request.resume_after_characters for request in server.requests] == [0, 2, 0]  # type: ignore[attr-defined]


async def test_a_server_without_keys(program: ClientProgram) -> None:
    """A server of an older version ignores the position: the program prints no text twice."""
    async with ScriptedServer.running() as server:
        server.knows_keys = False
        server.script_error(grpc.StatusCode.UNAVAILABLE, "gone", after=("Hel",))
        server.script_reply("Hello.")
        output, errors = await program.chat(server.address, "one")
        assert output.strip() == "Hel"
        assert "incomplete: " in errors


def _turns(request: object) -> list[tuple[str, str]]:
    assert isinstance(request, pb.GenerateRequest)
    return [(message.role, message.content) for message in request.messages]
