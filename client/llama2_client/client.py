"""The async client of the service."""

# ruff: noqa: ASYNC109 - gRPC sends the deadline of a call to the server; `asyncio.timeout` cannot.
from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message as ProtobufMessage
from grpc_health.v1 import health_pb2

from llama2.v1 import (
    account_pb2,
    account_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    text_generation_pb2,
    text_generation_pb2_grpc,
)
from llama2_client.channel import DEFAULT_PORT, channel_credentials, grpc_target, open_channel
from llama2_client.chat import Chat
from llama2_client.errors import Llama2Error, translate_errors
from llama2_client.reply import Message, Reply, ReplyStream
from llama2_client.request import GenerationOptions, build_request

DEFAULT_TIMEOUT_SECONDS = 120.0
# Three years. gRPC's clock overflows far above this, and the call would fail immediately.
MAX_TIMEOUT_SECONDS = 1e8

_Request = TypeVar("_Request", bound=ProtobufMessage)
_Response = TypeVar("_Response", bound=ProtobufMessage)


class HealthStatus(enum.StrEnum):
    """The status of a service, as defined by the gRPC health protocol."""

    UNKNOWN = "UNKNOWN"
    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    SERVICE_UNKNOWN = "SERVICE_UNKNOWN"  # the server does not have a service of this name


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """The input tokens of a request and the largest possible `max_tokens`: 0 if the input does not fit the context."""

    input_tokens: int
    max_output_tokens: int


class Client:
    """A client of one llama2-grpc service.

    ```python
    async with Client("localhost:50051") as client:
        reply = await client.generate("Tell me a story about a fox.", max_tokens=100)
        print(reply.text, reply.neurons)
    ```

    A call that fails raises a Llama2Error. Cancelling the task of a call cancels the call on the server immediately.

    Args:
        target: `host:port`, resolved by DNS, or any gRPC target such as `ipv4:10.0.0.1:50051,10.0.0.2:50051` or
            `unix:/run/llama2.sock`. The default port is 50051. Calls are distributed round robin over all addresses.
        api_key: sent as `authorization: Bearer …`. Without `tls`, the key is sent unencrypted.
        timeout: the default deadline of a call in seconds; None for no deadline.
        tls: True to trust the public root certificates, PEM bytes to trust these root certificates, gRPC channel
            credentials for anything else (such as client certificates), or False for plain text.
    """

    def __init__(
        self,
        target: str = f"localhost:{DEFAULT_PORT}",
        *,
        api_key: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
        tls: bool | bytes | grpc.ChannelCredentials = False,
    ) -> None:
        if timeout is not None and math.isnan(timeout):
            raise ValueError("timeout: must be a number of seconds, got nan")
        # gRPC's own error would contain the whole header, including the key.
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("api_key: must be printable ASCII")
        self.target = grpc_target(target)
        self.timeout = timeout
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key is not None else ()
        self._credentials = channel_credentials(tls)
        self._open_channel: grpc.aio.Channel | None = None

    def __repr__(self) -> str:
        return f"Client({self.target!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections and cancel the calls in progress. The next call opens new connections."""
        channel, self._open_channel = self._open_channel, None
        if channel is not None:
            await channel.close()

    async def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[Message | Mapping[str, str]] | None = None,
        raw: bool | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Reply:
        """Generate a whole reply to `prompt` or `messages`.

        Args:
            prompt: the text to reply to.
            messages: the conversation to reply to, instead of `prompt`.
            raw: True continues `prompt` without the chat template.
            options: sampling options, `stop`, `no_cache` and `timeout`; see GenerationOptions.
        """
        timeout = options.pop("timeout", None)
        request = build_request(text_generation_pb2.GenerateRequest(), prompt, messages, raw, options)
        generate = text_generation_pb2_grpc.TextGenerationServiceStub(self._channel).Generate
        response = await self._unary(generate, request, timeout)
        return Reply.from_proto(response.response, response.completion)

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[Message | Mapping[str, str]] | None = None,
        raw: bool | None = None,
        **options: Unpack[GenerationOptions],
    ) -> ReplyStream:
        """Start a reply and stream its text. Takes the arguments of `generate`; needs a running event loop."""
        timeout = options.pop("timeout", None)
        request = build_request(text_generation_pb2.GenerateRequest(), prompt, messages, raw, options)
        generate_stream = text_generation_pb2_grpc.TextGenerationServiceStub(self._channel).GenerateStream
        return ReplyStream(generate_stream(request, timeout=self._seconds(timeout), metadata=self._metadata))

    def chat(self, system: str | None = None, **defaults: Unpack[GenerationOptions]) -> Chat:
        """Start a conversation; `defaults` are the generation options of every turn."""
        return Chat(self.stream, system, **defaults)

    async def count_tokens(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[Message | Mapping[str, str]] | None = None,
        raw: bool | None = None,
        timeout: float | None = None,
    ) -> TokenCount:
        """Count the input tokens of a request without generating a reply."""
        request = build_request(text_generation_pb2.CountTokensRequest(), prompt, messages, raw, {})
        count_tokens = text_generation_pb2_grpc.TextGenerationServiceStub(self._channel).CountTokens
        response = await self._unary(count_tokens, request, timeout)
        return TokenCount(input_tokens=response.input_tokens, max_output_tokens=response.max_output_tokens)

    async def model_card(self, *, timeout: float | None = None) -> model_pb2.ModelCard:
        """Return the server's model card as a protobuf message."""
        get_model_card = model_pb2_grpc.ModelServiceStub(self._channel).GetModelCard
        return (await self._unary(get_model_card, model_pb2.GetModelCardRequest(), timeout)).model_card

    async def usage(
        self, *, since: date | None = None, until: date | None = None, timeout: float | None = None
    ) -> account_pb2.GetUsageResponse:
        """Return the account's daily usage and its quota as a protobuf message; days are in UTC."""
        request = account_pb2.GetUsageRequest()
        if since is not None:
            request.since = since.isoformat()
        if until is not None:
            request.until = until.isoformat()
        return await self._unary(account_pb2_grpc.AccountServiceStub(self._channel).GetUsage, request, timeout)

    async def health(self, service: str = "", *, timeout: float | None = None) -> HealthStatus:
        """Return the health of a service, given its full name, or of the whole server.

        Never retried, because the result is the status at this moment.
        """
        check: grpc.aio.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]
        check = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            response = await self._unary(check, health_pb2.HealthCheckRequest(service=service), timeout)
        except Llama2Error as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                return HealthStatus.SERVICE_UNKNOWN
            raise
        return HealthStatus(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    async def _unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout: float | None,
    ) -> _Response:
        with translate_errors():
            return await method(request, timeout=self._seconds(timeout), metadata=self._metadata)

    def _seconds(self, timeout: float | None) -> float | None:
        seconds = self.timeout if timeout is None else timeout
        return None if seconds is None or seconds > MAX_TIMEOUT_SECONDS else seconds

    @property
    def _channel(self) -> grpc.aio.Channel:
        # Open the channel at the first call, because it is bound to the event loop that runs at that moment.
        if self._open_channel is None:
            self._open_channel = open_channel(self.target, self._credentials)
        return self._open_channel
