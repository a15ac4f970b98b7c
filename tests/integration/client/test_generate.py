"""The client's calls, against a scripted server on a real socket."""

from __future__ import annotations

import asyncio
import gc
import math
from datetime import date
from decimal import Decimal
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from tests.support.certificates import Authority
from tests.support.scripted_server import CARD, COMPLETION, USAGE, ScriptedServer

from llama2.v1 import account_pb2, text_generation_pb2
from llama2_client import (
    Client,
    DeadlineExceeded,
    FinishReason,
    GenerationOptions,
    HealthStatus,
    InternalError,
    InvalidRequest,
    Llama2Error,
    Message,
    QueueFull,
    Reply,
    TokenCount,
    Unavailable,
)

REPLY = Reply(
    text="Hello world",
    finish_reason=FinishReason.END_OF_SEQUENCE,
    input_tokens=20,
    output_tokens=13,
    reused_input_tokens=16,
    neurons=Decimal("12.1176"),
    seed=2**64 - 1,
    cached=False,
    request_id="6d1a4a7d1f3e4c0e9a3b5c7d9e1f2a3b",
    queue_time_seconds=0.25,
    time_to_first_token_seconds=0.5,
    total_time_seconds=2.0,
)

EVERY_OPTION = GenerationOptions(
    max_tokens=7,
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    seed=2**64 - 1,
    repetition_penalty=1.5,
    frequency_penalty=-0.5,
    presence_penalty=0.0,
    stop=("\n", "END"),
    no_cache=False,
)


class TestGenerate:
    async def test_returns_the_reply_and_its_figures(self, client: Client) -> None:
        """A reply has the text and every figure of the completion."""
        assert await client.generate("Hi") == REPLY

    async def test_leaves_unset_what_is_unset(self, client: Client, server: ScriptedServer) -> None:
        """What the caller does not give is not on the wire."""
        await client.generate("Hi", top_p=None)
        assert server.requests == [text_generation_pb2.GenerateRequest(prompt="Hi")]

    async def test_sends_every_option_even_zeros(self, client: Client, server: ScriptedServer) -> None:
        """Every option is on the wire as given; zero and False count as given."""
        await client.generate("Hi", raw=False, **EVERY_OPTION)
        assert server.requests == [
            text_generation_pb2.GenerateRequest(
                prompt="Hi",
                raw=False,
                max_tokens=7,
                temperature=0.0,
                top_p=1.0,
                top_k=0,
                seed=2**64 - 1,
                repetition_penalty=1.5,
                frequency_penalty=-0.5,
                presence_penalty=0.0,
                stop=["\n", "END"],
                no_cache=False,
            )
        ]

    async def test_sends_messages(self, client: Client, server: ScriptedServer) -> None:
        """Messages go out in order, as our own type or as plain mappings; a missing key stays unset."""
        await client.generate(
            messages=[Message("system", "Be brief."), {"role": "user", "content": ""}, {"role": "user"}]
        )
        assert server.requests == [
            text_generation_pb2.GenerateRequest(
                messages=[
                    text_generation_pb2.Message(role="system", content="Be brief."),
                    text_generation_pb2.Message(role="user", content=""),
                    text_generation_pb2.Message(role="user"),
                ]
            )
        ]

    async def test_takes_a_single_stop_text(self, client: Client, server: ScriptedServer) -> None:
        """A stop text given as a string is one text, not one for each of its letters."""
        await client.generate("Hi", stop="END")
        assert server.requests == [text_generation_pb2.GenerateRequest(prompt="Hi", stop=["END"])]

    async def test_names_what_the_wire_cannot_carry(self, client: Client, server: ScriptedServer) -> None:
        """Text that is not Unicode and numbers that do not fit are refused before the call, each by its field."""
        with pytest.raises(InvalidRequest) as caught:
            await client.generate("\ud800", seed=-1, stop=["\udc00"])
        assert [violation.field for violation in caught.value.violations] == ["prompt", "seed", "stop"]
        with pytest.raises(InvalidRequest) as caught:
            await client.generate(messages=[{"role": "user", "content": "a"}, {"role": "user", "content": "\ud800"}])
        assert [violation.field for violation in caught.value.violations] == ["messages[1]"]
        assert server.requests == []

    async def test_refuses_an_unknown_option(self, client: Client) -> None:
        """A misspelt option is a TypeError, not silently dropped."""
        with pytest.raises(TypeError, match="temprature"):
            await client.generate("Hi", temprature=1.0)  # type: ignore[call-arg]

    async def test_a_reason_of_a_newer_server_is_unspecified(self, client: Client, server: ScriptedServer) -> None:
        """A finish reason that this client does not know does not break the reply."""
        completion = text_generation_pb2.Completion.FromString(COMPLETION.SerializeToString() + b"\x08\x63")
        server.says("Hi", completion=completion)
        assert (await client.generate("Hi")).finish_reason is FinishReason.UNSPECIFIED


class TestStream:
    async def test_yields_deltas_then_has_the_reply(self, client: Client) -> None:
        """Deltas come as sent; the reply is there after the end, equal to the gathered one."""
        stream = client.stream("Hi")
        deltas = [delta async for delta in stream]
        assert deltas == ["Hello", " world"]
        assert stream.reply == REPLY
        assert [delta async for delta in stream] == []

    async def test_has_no_reply_before_its_end(self, client: Client, server: ScriptedServer) -> None:
        """Asking for the reply of a stream that is under way is an error; the text so far is there."""
        server.hangs(after=("Once",))
        async with client.stream("Hi") as stream:
            assert await anext(stream) == "Once"
            assert stream.text == "Once"
            with pytest.raises(RuntimeError, match="not come to its end"):
                _ = stream.reply

    async def test_sends_what_generate_sends(self, client: Client, server: ScriptedServer) -> None:
        """A stream's request carries the same fields."""
        async with client.stream("Hi", **EVERY_OPTION) as stream:
            await anext(stream)
        await client.generate("Hi", **EVERY_OPTION)
        assert server.requests[0] == server.requests[1]

    async def test_leaving_the_block_cancels_the_call(self, client: Client, server: ScriptedServer) -> None:
        """Leaving `async with` early cancels the call on the server."""
        server.hangs(after=("Once", " upon"))
        async with client.stream("Hi") as stream:
            await anext(stream)
        await asyncio.wait_for(server.cancelled.wait(), 5)
        assert [delta async for delta in stream] == []

    async def test_dropping_the_stream_cancels_the_call(self, client: Client, server: ScriptedServer) -> None:
        """A loop that breaks without closing the stream cancels the call on the server too."""
        server.hangs(after=("Once", " upon"))
        async for _ in client.stream("Hi"):
            break
        gc.collect()
        await asyncio.wait_for(server.cancelled.wait(), 5)

    async def test_cancelling_the_task_cancels_the_call(self, client: Client, server: ScriptedServer) -> None:
        """A cancelled task stays cancelled, and its call is cancelled on the server."""
        server.hangs(after=("Once",))
        reading = asyncio.Event()

        async def read() -> None:
            async for _ in client.stream("Hi"):
                reading.set()

        task = asyncio.create_task(read())
        await reading.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(server.cancelled.wait(), 5)

    async def test_closing_from_another_task_ends_the_iteration(self, client: Client, server: ScriptedServer) -> None:
        """A stop button in another task ends the reader's loop; the reader itself is not cancelled."""
        server.hangs(after=("Once",))
        stream = client.stream("Hi")
        reading = asyncio.Event()

        async def read() -> list[str]:
            deltas = []
            async for delta in stream:
                deltas.append(delta)
                reading.set()
            return deltas

        task = asyncio.create_task(read())
        await reading.wait()
        await stream.aclose()
        assert await task == ["Once"]
        await asyncio.wait_for(server.cancelled.wait(), 5)

    async def test_cancelling_a_whole_call_cancels_it_on_the_server(
        self, client: Client, server: ScriptedServer
    ) -> None:
        """A timeout around `generate` cancels the call on the server, and stays a timeout."""
        server.hangs()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.generate("Hi"), 0.3)
        await asyncio.wait_for(server.cancelled.wait(), 5)

    async def test_an_error_after_text_is_raised_in_its_place(self, client: Client, server: ScriptedServer) -> None:
        """What came before a failure is yielded, then the failure is raised."""
        server.refuses(grpc.StatusCode.INTERNAL, "engine down", after=("Once", " upon"))
        stream = client.stream("Hi")
        assert [await anext(stream), await anext(stream)] == ["Once", " upon"]
        with pytest.raises(InternalError, match="engine down"):
            await anext(stream)
        assert stream.closed

    async def test_an_end_without_completion_is_a_fault(self, client: Client, server: ScriptedServer) -> None:
        """A stream that ends without its completion is no reply."""
        server.says("Once", completion=None)
        with pytest.raises(InternalError, match="without saying how"):
            async for _ in client.stream("Hi"):
                pass


class TestRetries:
    async def test_unavailable_is_retried_before_the_first_message(
        self, client: Client, server: ScriptedServer
    ) -> None:
        """A server that is briefly unavailable is asked again, for whole replies and for streams."""
        for _ in range(3):
            server.refuses(grpc.StatusCode.UNAVAILABLE, pushback_ms=1)
        server.says("Hello", " world")
        assert await client.generate("Hi") == REPLY
        assert len(server.requests) == 4

        server.refuses(grpc.StatusCode.UNAVAILABLE, pushback_ms=1)
        server.says("Hello", " world")
        assert "".join([delta async for delta in client.stream("Hi")]) == "Hello world"

    async def test_nothing_is_retried_after_the_first_message(self, client: Client, server: ScriptedServer) -> None:
        """Once text has come, a failure is the caller's to see: the reply is not begun again."""
        server.refuses(grpc.StatusCode.UNAVAILABLE, after=("Once",), pushback_ms=1)
        stream = client.stream("Hi")
        assert await anext(stream) == "Once"
        with pytest.raises(Unavailable):
            await anext(stream)
        assert len(server.requests) == 1

    async def test_five_attempts_are_the_most(self, client: Client, server: ScriptedServer) -> None:
        """A server that stays unavailable is asked five times."""
        server.refuses(grpc.StatusCode.UNAVAILABLE, pushback_ms=1)
        with pytest.raises(Unavailable):
            await client.count_tokens("Hi")
        assert len(server.requests) == 5

    async def test_a_call_that_a_stopping_server_cut_off_is_retried(
        self, client: Client, server: ScriptedServer
    ) -> None:
        """A call that comes just when a gRPC server stops ends with CANCELLED, unseen by any handler."""
        server.refuses(grpc.StatusCode.CANCELLED)
        server.says("Hello", " world")
        assert await client.generate("Hi") == REPLY

    async def test_the_servers_pushback_is_honoured(self, client: Client, server: ScriptedServer) -> None:
        """A server that asks not to be asked again (a negative pushback) is not."""
        server.refuses(grpc.StatusCode.UNAVAILABLE, pushback_ms=-1)
        with pytest.raises(Unavailable):
            await client.model_card()
        assert len(server.requests) == 1

    async def test_other_codes_are_not_retried(self, client: Client, server: ScriptedServer) -> None:
        """A full line is the caller's to wait for: retries would make it longer."""
        server.refuses(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "line full",
            error_details_pb2.RetryInfo(retry_delay=Duration(nanos=1_000_000)),
            pushback_ms=1,
        )
        with pytest.raises(QueueFull):
            await client.generate("Hi")
        assert len(server.requests) == 1


class TestChannel:
    async def test_calls_go_to_all_addresses_in_turn(self, server: ScriptedServer) -> None:
        """With several addresses, each gets every other call."""
        async with (
            ScriptedServer.running() as other,
            Client(f"ipv4:{server.address},{other.address}", timeout=10) as client,
        ):
            async with asyncio.timeout(10):
                while not (server.requests and other.requests):  # until both connections stand
                    await client.generate("Hi")
            before = len(server.requests), len(other.requests)
            for _ in range(6):
                await client.generate("Hi")
            assert (len(server.requests) - before[0], len(other.requests) - before[1]) == (3, 3)

    async def test_sends_the_key_as_a_bearer_token(self, server: ScriptedServer) -> None:
        """The API key goes in the authorization header of every call."""
        async with Client(server.address, api_key="s3cret") as client:
            await client.generate("Hi")
            await client.model_card()
            async for _ in client.stream("Hi"):
                pass
        assert [metadata.get("authorization") for metadata in server.metadata] == ["Bearer s3cret"] * 3

    async def test_sends_no_header_without_a_key(self, client: Client, server: ScriptedServer) -> None:
        """Without a key there is no authorization header at all."""
        await client.generate("Hi")
        assert "authorization" not in server.metadata[0]

    def test_never_shows_the_key(self) -> None:
        """Neither the client's repr nor the refusal of a bad key shows it."""
        assert "s3cret" not in repr(Client(api_key="s3cret"))
        with pytest.raises(ValueError, match="printable ASCII") as caught:
            Client(api_key="s3cret\n")
        assert "s3cret" not in str(caught.value)

    async def test_the_default_deadline_is_the_clients(self, client: Client, server: ScriptedServer) -> None:
        """The server sees the client's deadline, or the call's own where one is given."""
        await client.generate("Hi")
        await client.generate("Hi", timeout=100)
        async for _ in client.stream("Hi", timeout=100):
            pass
        default, own, streamed = (left or 0 for left in server.seconds_left)
        assert default == pytest.approx(10, rel=0.2)  # gRPC rounds a deadline on the wire
        assert own == pytest.approx(100, rel=0.2)
        assert streamed == pytest.approx(100, rel=0.2)

    async def test_a_client_may_have_no_deadline(self, server: ScriptedServer) -> None:
        """`timeout=None` waits as long as it takes."""
        async with Client(server.address, timeout=None) as client:
            await client.generate("Hi")
        assert server.seconds_left == [None]

    async def test_an_endless_timeout_is_none(self, client: Client, server: ScriptedServer) -> None:
        """Infinity, and what is beyond all reason, wait as long as it takes; what is no number is refused."""
        await client.generate("Hi", timeout=math.inf)
        await client.generate("Hi", timeout=1e300)
        assert server.seconds_left == [None, None]
        with pytest.raises(ValueError, match="timeout"):
            Client(timeout=math.nan)

    async def test_a_passed_deadline_is_raised(self, client: Client, server: ScriptedServer) -> None:
        """A call that outlives its deadline raises and is cancelled on the server."""
        server.hangs()
        with pytest.raises(DeadlineExceeded):
            await client.generate("Hi", timeout=0.3)
        await asyncio.wait_for(server.cancelled.wait(), 5)

    async def test_works_after_being_closed(self, client: Client) -> None:
        """A closed client opens new connections at the next call."""
        await client.generate("Hi")
        await client.aclose()
        assert await client.generate("Hi") == REPLY

    @pytest.mark.parametrize(
        ("target", "resolved"),
        [
            ("localhost:50051", "dns:///localhost:50051"),
            ("llama2.default.svc", "dns:///llama2.default.svc:50051"),
            ("127.0.0.1", "dns:///127.0.0.1:50051"),
            ("::1", "dns:///[::1]:50051"),
            ("[::1]:80", "dns:///[::1]:80"),
            ("[::1]", "dns:///[::1]:50051"),
            ("ipv4:10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2"),
            ("unix:/run/llama2.sock", "unix:/run/llama2.sock"),
            ("dns://8.8.8.8/llama2:1", "dns://8.8.8.8/llama2:1"),
        ],
    )
    def test_resolves_plain_addresses_by_dns(self, target: str, resolved: str) -> None:
        """A host and port goes to DNS; gRPC's own targets are left as they are."""
        assert Client(target).target == resolved

    async def test_speaks_tls_with_the_given_root(self, tmp_path: Path) -> None:
        """With the server's root certificate the call is encrypted and works; with the public roots it is refused."""
        authority = Authority(tmp_path)
        certificate, key = authority.pair()
        credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
        async with ScriptedServer.running(credentials=credentials) as server:
            async with Client(server.address, tls=authority.root, timeout=10) as client:
                assert await client.generate("Hi") == REPLY
            async with Client(server.address, tls=True, timeout=10) as client:
                with pytest.raises(Unavailable):
                    await client.generate("Hi")

    async def test_takes_channel_credentials(self) -> None:
        """Any gRPC channel credentials will do for `tls`."""
        async with (
            ScriptedServer.running(credentials=grpc.local_server_credentials()) as server,
            Client(server.address, tls=grpc.local_channel_credentials(), timeout=10) as client,
        ):
            assert await client.generate("Hi") == REPLY


class TestChat:
    async def test_each_turn_sends_the_turns_before_it(self, client: Client, server: ScriptedServer) -> None:
        """The system message, the earlier turns and the new question go out in order."""
        server.says("Ahoy!")
        server.says("To the ", "isle.")
        chat = client.chat(system="You are a pirate.", seed=1)
        assert (await chat.say("Hello?")).text == "Ahoy!"
        assert "".join([delta async for delta in chat.stream("Where to?", temperature=0)]) == "To the isle."
        assert server.requests[1] == text_generation_pb2.GenerateRequest(
            messages=[
                text_generation_pb2.Message(role="system", content="You are a pirate."),
                text_generation_pb2.Message(role="user", content="Hello?"),
                text_generation_pb2.Message(role="assistant", content="Ahoy!"),
                text_generation_pb2.Message(role="user", content="Where to?"),
            ],
            seed=1,
            temperature=0,
        )
        assert chat.history[-2:] == (Message("user", "Where to?"), Message("assistant", "To the isle."))

    async def test_a_turn_left_early_leaves_no_trace(self, client: Client, server: ScriptedServer) -> None:
        """A turn whose reply is stopped counts as never said."""
        server.says("One.")
        server.hangs(after=("Half a",))
        server.says("Three.")
        chat = client.chat()
        await chat.say("1")
        async with chat.stream("2") as stream:
            await anext(stream)
        await chat.say("3")
        assert [message.content for message in chat.history] == ["1", "One.", "3", "Three."]

    async def test_a_failed_turn_leaves_no_trace(self, client: Client, server: ScriptedServer) -> None:
        """A turn that fails, before or after text came, counts as never said."""
        server.refuses(grpc.StatusCode.RESOURCE_EXHAUSTED)
        server.refuses(grpc.StatusCode.INTERNAL, after=("Half a",))
        server.says("Three.")
        chat = client.chat()
        for text in ("1", "2"):
            with pytest.raises(Llama2Error):
                await chat.say(text)
        await chat.say("3")
        assert [message.content for message in chat.history] == ["3", "Three."]

    async def test_a_cancelled_turn_leaves_no_trace(self, client: Client, server: ScriptedServer) -> None:
        """A turn whose task is cancelled counts as never said."""
        server.hangs(after=("Half a",))
        chat = client.chat()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(chat.say("1"), 0.3)
        assert chat.history == ()

    async def test_turns_come_one_after_the_other(self, client: Client, server: ScriptedServer) -> None:
        """A second turn while one is open is refused: its place in the history would be unclear."""
        server.hangs(after=("Once",))
        chat = client.chat()
        async with chat.stream("1") as stream:
            await anext(stream)
            with pytest.raises(RuntimeError, match="turn before"):
                chat.stream("2")

    async def test_forgets_its_turns(self, client: Client) -> None:
        """`clear` forgets the turns and keeps the system message."""
        chat = client.chat("Be brief.")
        await chat.say("Hi")
        chat.clear()
        assert chat.history == (Message("system", "Be brief."),)


class TestOtherCalls:
    async def test_counts_tokens(self, client: Client, server: ScriptedServer) -> None:
        """The count and what it leaves come back; only what was given is sent."""
        assert await client.count_tokens("Hi", raw=True) == TokenCount(input_tokens=20, max_output_tokens=2500)
        await client.count_tokens(messages=[Message("user", "Hi")])
        assert server.requests == [
            text_generation_pb2.CountTokensRequest(prompt="Hi", raw=True),
            text_generation_pb2.CountTokensRequest(messages=[text_generation_pb2.Message(role="user", content="Hi")]),
        ]

    async def test_returns_the_card(self, client: Client) -> None:
        """The card comes as the server has it."""
        assert await client.model_card() == CARD

    async def test_tells_the_usage_of_some_days(self, client: Client, server: ScriptedServer) -> None:
        """Usage comes as the server has it; days go out as dates, and those that are not given stay unset."""
        assert await client.usage() == USAGE
        assert await client.usage(since=date(2026, 11, 2), until=date(2026, 11, 30)) == USAGE
        assert server.requests == [
            account_pb2.GetUsageRequest(),
            account_pb2.GetUsageRequest(since="2026-11-02", until="2026-11-30"),
        ]

    @pytest.mark.parametrize(
        ("service", "status"),
        [
            ("", HealthStatus.SERVING),
            ("tired", HealthStatus.NOT_SERVING),
            ("nobody", HealthStatus.SERVICE_UNKNOWN),
        ],
    )
    async def test_tells_the_health(self, client: Client, service: str, status: HealthStatus) -> None:
        """Each answer of the health protocol has its own value, an unknown service included."""
        assert await client.health(service) is status
