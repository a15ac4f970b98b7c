"""A small gRPC server that sends the replies a test scripts, and records the requests it receives."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Self, TypeAlias

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from llama2.v1 import (
    account_pb2,
    account_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    text_generation_pb2,
    text_generation_pb2_grpc,
)

Part: TypeAlias = text_generation_pb2.GenerateStreamResponse
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Script: TypeAlias = Callable[[Context], AsyncIterator[Part]]

CARD = model_pb2.ModelCard(
    id="9c95c39d-45b3-4163-9631-22f0c0dc3b14",
    name="@cf/meta/llama-2-7b-chat-fp16",
    display_name="Llama 2 7B chat",
    description="Full precision (fp16) generative text model with 7 billion parameters.",
    task=model_pb2.ModelTask(id="c329a1f9-323d-4e91-b2aa-582dd4188d34", name="Text Generation"),
    limits=model_pb2.Limits(context_length_limit=3072, sequence_length_limit=2500, max_concurrent_requests=1),
    quota=model_pb2.Quota(max_requests_per_min=5, account_max_requests_per_min=60, account_neurons_per_month="1000"),
    prices=[
        model_pb2.Price(metric="input_tokens", neuron_cost="0.3672"),
        model_pb2.Price(metric="output_tokens", neuron_cost="0.3672"),
    ],
    generation_defaults=model_pb2.GenerationDefaults(max_tokens=256, temperature=0.6, top_p=0.9, repetition_penalty=1),
    input_schema="{}",
    output_schema="{}",
)

COMPLETION = text_generation_pb2.Completion(
    finish_reason=text_generation_pb2.FINISH_REASON_END_OF_SEQUENCE,
    usage=text_generation_pb2.Usage(input_tokens=20, output_tokens=13, neurons="12.1176", reused_input_tokens=16),
    seed=2**64 - 1,
    cached=False,
    request_id="6d1a4a7d1f3e4c0e9a3b5c7d9e1f2a3b",
    fingerprint="f0" * 32,
    timings=text_generation_pb2.Timings(
        queue_time=Duration(nanos=250_000_000),
        time_to_first_token=Duration(nanos=500_000_000),
        total_time=Duration(seconds=2),
    ),
)

USAGE = account_pb2.GetUsageResponse(
    account="42",
    quota=account_pb2.QuotaState(max_requests_per_min=5, requests_left=3, resets_in=Duration(seconds=59, nanos=1)),
    days=[
        account_pb2.DailyUsage(
            date="2026-11-22", model=CARD.name, requests=1234, input_tokens=20, output_tokens=13, neurons="12.1176"
        ),
        account_pb2.DailyUsage(date="2026-11-23", model=CARD.name, requests=1, cached_tokens=33, neurons="0"),
    ],
    budget=account_pb2.BudgetState(
        neurons_per_month="1000",
        neurons_spent="12.1176",
        neurons_reserved="93.3",
        resets_in=Duration(seconds=6 * 86_400 + 1),
    ),
)


class ScriptedServer(
    text_generation_pb2_grpc.TextGenerationServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    account_pb2_grpc.AccountServiceServicer,
):
    """Plays one script per call, in the order they were added. The last script also serves all later calls.

    A script of a resumed stream has the rest of the text only.
    """

    def __init__(self) -> None:
        self.address = ""
        self.requests: list[Message] = []  # without their idempotency keys
        self.keys: list[str] = []  # the idempotency key of each Generate and GenerateStream; empty without one
        self.knows_keys = True  # False for a server of an older version
        self.metadata: list[dict[str, str | bytes]] = []
        self.remaining_seconds: list[float | None] = []  # per call, until its deadline
        self.hanging = asyncio.Event()  # set when a call reaches the end of `script_hang`
        self.cancelled = asyncio.Event()  # set when a call is cancelled while it generates
        self._scripts: list[Script] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None
    ) -> AsyncIterator[Self]:
        """Serve on a free port of the loopback interface."""
        scripted = cls()
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        text_generation_pb2_grpc.add_TextGenerationServiceServicer_to_server(scripted, server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(scripted, server)
        account_pb2_grpc.add_AccountServiceServicer_to_server(scripted, server)
        statuses = health.aio.HealthServicer()
        await statuses.set("llama2.v1.TextGenerationService", health_pb2.HealthCheckResponse.SERVING)  # for Envoy
        await statuses.set("paused", health_pb2.HealthCheckResponse.NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(statuses, server)
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
        scripted.address = f"127.0.0.1:{port}"
        await server.start()
        try:
            yield scripted
        finally:
            await server.stop(grace=None)

    def script_reply(self, *deltas: str, completion: text_generation_pb2.Completion | None = COMPLETION) -> None:
        """Send these deltas, one message each, and then the completion."""

        async def script(context: Context) -> AsyncIterator[Part]:
            for delta in deltas:
                yield Part(response=delta)
            if completion is not None:
                yield Part(completion=completion)

        self._scripts.append(script)

    def script_error(
        self,
        code: grpc.StatusCode,
        message: str = "rejected",
        *details: Message,
        after: tuple[str, ...] = (),
        pushback_ms: int | None = None,
        raw_details: bytes | None = None,
    ) -> None:
        """Send the deltas in `after`, then end the call with this status and these details."""
        status = status_pb2.Status(code=code.value[0], message=message)
        for detail in details:
            status.details.add().Pack(detail)
        trailers: list[tuple[str, str | bytes]] = []
        if raw_details is not None or details:
            trailers.append(("grpc-status-details-bin", raw_details or status.SerializeToString()))
        if pushback_ms is not None:
            trailers.append(("grpc-retry-pushback-ms", str(pushback_ms)))

        async def script(context: Context) -> AsyncIterator[Part]:
            for delta in after:
                yield Part(response=delta)
            await context.abort(code, message, trailing_metadata=tuple(trailers))

        self._scripts.append(script)

    def script_hang(self, *, after: tuple[str, ...] = ()) -> None:
        """Send these deltas, set `hanging`, and then send nothing until the call is cancelled."""

        async def script(context: Context) -> AsyncIterator[Part]:
            for delta in after:
                yield Part(response=delta)
            self.hanging.set()
            await asyncio.Event().wait()

        self._scripts.append(script)

    async def Generate(
        self, request: text_generation_pb2.GenerateRequest, context: Context
    ) -> text_generation_pb2.GenerateResponse:
        """Send the whole text of the script in one message."""
        response = text_generation_pb2.GenerateResponse()
        with self._record_cancellation():
            async for part in self._play(request, context):
                response.response += part.response
                if part.HasField("completion"):
                    response.completion.CopyFrom(part.completion)
        return response

    async def GenerateStream(
        self, request: text_generation_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[Part]:
        """Stream the messages of the script."""
        position = request.resume_after_characters if self.knows_keys else 0
        with self._record_cancellation():
            async for part in self._play(request, context):
                if position:
                    part.resumed_after_characters, position = position, 0
                yield part

    async def CountTokens(
        self, request: text_generation_pb2.CountTokensRequest, context: Context
    ) -> text_generation_pb2.CountTokensResponse:
        """Count every prompt as 20 tokens, unless the script ends with an error."""
        async for _ in self._play(request, context):
            pass
        return text_generation_pb2.CountTokensResponse(
            input_tokens=20,
            max_output_tokens=2500,
            max_neurons="101.3472",
            requests_left=3,
            estimated_queue_time=Duration(seconds=4, nanos=500_000_000),
        )

    async def GetModelCard(
        self, request: model_pb2.GetModelCardRequest, context: Context
    ) -> model_pb2.GetModelCardResponse:
        """Return CARD, unless the script ends with an error."""
        async for _ in self._play(request, context):
            pass
        return model_pb2.GetModelCardResponse(model_card=CARD)

    async def GetUsage(self, request: account_pb2.GetUsageRequest, context: Context) -> account_pb2.GetUsageResponse:
        """Return USAGE, unless the script ends with an error."""
        async for _ in self._play(request, context):
            pass
        return USAGE

    @contextlib.contextmanager
    def _record_cancellation(self) -> Iterator[None]:
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):  # GeneratorExit if a generator is cancelled at its `yield`
            self.cancelled.set()
            raise

    def _play(self, request: Message, context: Context) -> AsyncIterator[Part]:
        if isinstance(request, text_generation_pb2.GenerateRequest):
            self.keys.append(request.idempotency_key)
            request.ClearField("idempotency_key")
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.remaining_seconds.append(context.time_remaining())
        if not self._scripts:
            self.script_reply("Hello", " world")
        return (self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0])(context)
