"""The synchronous client of the service."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from datetime import date
from types import TracebackType
from typing import Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message as ProtobufMessage

from llama2.v1 import (
    account_pb2,
    account_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    text_generation_pb2,
    text_generation_pb2_grpc,
)
from llama2_client.attempts import StreamProgress, with_key
from llama2_client.channel import MAX_ATTEMPTS
from llama2_client.reply import HealthStatus, Message, Reply, TokenCount
from llama2_client.request import GenerationOptions, build_request, usage_request
from llama2_client.settings import DEFAULT_TARGET, DEFAULT_TIMEOUT_SECONDS, ClientSettings
from llama2_client.sync.calls import check_health, open_channel, translate, unary
from llama2_client.sync.chat import SyncChat
from llama2_client.sync.interrupts import start_call
from llama2_client.sync.reply_stream import StreamCall, SyncReplyStream

_Request = TypeVar("_Request", bound=ProtobufMessage)
_Response = TypeVar("_Response", bound=ProtobufMessage)


class SyncClient:
    """A synchronous client of one llama2-grpc service: the twin of the async Client, with the same methods.

    ```python
    with SyncClient("localhost:50051") as client:
        reply = client.generate("Tell me a story about a fox.", max_tokens=100)
        print(reply.text, reply.neurons)
    ```

    A call that fails raises a Llama2Error. Ctrl-C cancels the call on the server immediately; the model stops within
    one decode step if another call waits for it, and otherwise after the server's resume window. Threads can share a
    client.

    Args:
        target: `host:port`, resolved by DNS, or any gRPC target such as `ipv4:10.0.0.1:50051,10.0.0.2:50051` or
            `unix:/run/llama2.sock`. The default port is 50051. Calls are distributed round robin over all addresses.
        api_key: sent as `authorization: Bearer …`. Without `tls`, the key is sent unencrypted.
        timeout: the default deadline of a call in seconds; None for no deadline.
        tls: True to trust the public root certificates, PEM bytes to trust these root certificates, gRPC channel
            credentials for anything else (such as client certificates), or False for plain text.
        server_name: the host name to expect in the server's certificate; None for the host of `target`.
        max_attempts: how often gRPC attempts a call that ends with UNAVAILABLE before its first message, from 1 to 5.
        quota_wait: the longest time in seconds that a call waits for a used-up quota, within its deadline; 0 raises
            QuotaExceeded immediately.
        resume: True continues a stream that breaks off, and sends an idempotency key with each call, so that a repeated
            call costs nothing. False sends no key, and the model stops within one decode step after a cancelled call.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
        tls: bool | bytes | grpc.ChannelCredentials = False,
        server_name: str | None = None,
        max_attempts: int = MAX_ATTEMPTS,
        quota_wait: float = 0.0,
        resume: bool = True,
    ) -> None:
        self._settings = ClientSettings.create(
            target,
            api_key=api_key,
            timeout=timeout,
            tls=tls,
            server_name=server_name,
            max_attempts=max_attempts,
            quota_wait=quota_wait,
            resume=resume,
        )
        self._open_channel: grpc.Channel | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.target!r})"

    @property
    def target(self) -> str:
        """The gRPC target of the server."""
        return self._settings.target

    @property
    def timeout(self) -> float | None:
        """The default deadline of a call in seconds; None for no deadline."""
        return self._settings.timeout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and cancel the calls in progress. The next call opens new connections."""
        with self._lock:
            channel, self._open_channel = self._open_channel, None
        if channel is not None:
            channel.close()

    def generate(
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
        with_key(self._settings, request)
        generate = text_generation_pb2_grpc.TextGenerationServiceStub(self._channel).Generate
        response = self._unary(generate, request, timeout)
        return Reply.from_proto(response.response, response.completion, request)

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[Message | Mapping[str, str]] | None = None,
        raw: bool | None = None,
        **options: Unpack[GenerationOptions],
    ) -> SyncReplyStream:
        """Start a reply and stream its text. Takes the arguments of `generate`."""
        timeout = options.pop("timeout", None)
        request = build_request(text_generation_pb2.GenerateRequest(), prompt, messages, raw, options)
        channel = self._channel
        generate_stream = text_generation_pb2_grpc.TextGenerationServiceStub(channel).GenerateStream

        def start(progress: StreamProgress) -> StreamCall:
            return start_call(
                lambda: generate_stream(
                    progress.request,
                    timeout=progress.remaining(),
                    metadata=self._settings.metadata,
                    wait_for_ready=progress.wait_for_ready,
                )
            )

        progress = StreamProgress(self._settings, request, timeout)
        return SyncReplyStream(progress, start, lambda error: translate(self._settings, channel, error))

    def chat(self, system: str | None = None, **defaults: Unpack[GenerationOptions]) -> SyncChat:
        """Start a conversation; `defaults` are the generation options of every turn."""
        return SyncChat(self.stream, system, **defaults)

    def count_tokens(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[Message | Mapping[str, str]] | None = None,
        raw: bool | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
    ) -> TokenCount:
        """Count the input tokens of a request, with the price of `max_tokens` output tokens, and generate nothing."""
        options: GenerationOptions = {"max_tokens": max_tokens}
        request = build_request(text_generation_pb2.CountTokensRequest(), prompt, messages, raw, options)
        count_tokens = text_generation_pb2_grpc.TextGenerationServiceStub(self._channel).CountTokens
        return TokenCount.from_proto(self._unary(count_tokens, request, timeout))

    def model_card(self, *, timeout: float | None = None) -> model_pb2.ModelCard:
        """Return the server's model card as a protobuf message."""
        get_model_card = model_pb2_grpc.ModelServiceStub(self._channel).GetModelCard
        return (self._unary(get_model_card, model_pb2.GetModelCardRequest(), timeout)).model_card

    def usage(
        self, *, since: date | None = None, until: date | None = None, timeout: float | None = None
    ) -> account_pb2.GetUsageResponse:
        """Return the account's daily usage and its quota as a protobuf message; days are in UTC."""
        get_usage = account_pb2_grpc.AccountServiceStub(self._channel).GetUsage
        return self._unary(get_usage, usage_request(since, until), timeout)

    def health(self, service: str = "", *, timeout: float | None = None) -> HealthStatus:
        """Return the health of a service, given its full name, or of the whole server.

        Never retried, because the result is the status at this moment.
        """
        return check_health(self._settings, self._channel, service, timeout)

    def _unary(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout: float | None,
    ) -> _Response:
        return unary(self._settings, self._channel, method, request, timeout)

    @property
    def _channel(self) -> grpc.Channel:
        with self._lock:
            if self._open_channel is None:
                self._open_channel = open_channel(self._settings)
            return self._open_channel
