"""Results of calls: messages, whole replies, token counts and health."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

from google.protobuf.duration_pb2 import Duration

from llama2.v1 import text_generation_pb2


class FinishReason(enum.StrEnum):
    """The reason why a reply ended."""

    UNSPECIFIED = "UNSPECIFIED"  # a newer server sent a reason that this client does not know
    END_OF_SEQUENCE = "END_OF_SEQUENCE"  # the model ended the reply
    STOP_SEQUENCE = "STOP_SEQUENCE"  # the reply completed one of the request's `stop` texts
    MAX_TOKENS = "MAX_TOKENS"  # the reply reached `max_tokens`

    @classmethod
    def from_proto(cls, value: text_generation_pb2.FinishReason) -> FinishReason:
        """Return the member for a protobuf value; UNSPECIFIED for an unknown one."""
        try:
            return cls(text_generation_pb2.FinishReason.Name(value).removeprefix("FINISH_REASON_"))
        except ValueError:
            return cls.UNSPECIFIED


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, or its system prompt; `content` is plain text."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole reply: its text, how it ended and its cost."""

    text: str
    finish_reason: FinishReason
    input_tokens: int
    output_tokens: int
    neurons: Decimal
    reused_input_tokens: int  # input tokens reused from the KV cache
    seed: int
    cached: bool  # True: from the response cache, or shared with an identical request in progress
    request_id: str
    fingerprint: str | None = None  # names everything else that decided the text; None if the server has none
    # True: the call's idempotency key holds only on the replica that served it, because its store did not answer.
    idempotency_local: bool = False
    queue_time_seconds: float
    time_to_first_token_seconds: float
    total_time_seconds: float
    # The API's own message, which may have fields of a newer server.
    completion: text_generation_pb2.Completion = field(
        default_factory=text_generation_pb2.Completion, repr=False, compare=False
    )
    # The request as it was sent; a receipt covers it.
    request: text_generation_pb2.GenerateRequest | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_proto(
        cls,
        text: str,
        completion: text_generation_pb2.Completion,
        request: text_generation_pb2.GenerateRequest | None = None,
    ) -> Reply:
        """Build a reply from its text, the server's completion message and the request as it was sent."""
        usage, timings = completion.usage, completion.timings
        return cls(
            text=text,
            finish_reason=FinishReason.from_proto(completion.finish_reason),
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            neurons=Decimal(usage.neurons or 0),
            reused_input_tokens=usage.reused_input_tokens,
            seed=completion.seed,
            cached=completion.cached,
            request_id=completion.request_id,
            fingerprint=completion.fingerprint or None,
            idempotency_local=completion.idempotency_local,
            queue_time_seconds=_seconds(timings.queue_time),
            time_to_first_token_seconds=_seconds(timings.time_to_first_token),
            total_time_seconds=_seconds(timings.total_time),
            completion=completion,
            request=request,
        )


class HealthStatus(enum.StrEnum):
    """The status of a service, as defined by the gRPC health protocol."""

    UNKNOWN = "UNKNOWN"
    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    SERVICE_UNKNOWN = "SERVICE_UNKNOWN"  # the server does not have a service of this name


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """The input tokens of a request, and what a call would cost and wait now."""

    input_tokens: int
    max_output_tokens: int  # the largest possible `max_tokens`; 0 if the input does not fit the context
    max_neurons: Decimal | None = None  # the highest price of a call; None if the input does not fit the context
    requests_left: int | None = None  # calls that the quota allows now; None if the quota store does not answer
    estimated_queue_time_seconds: float | None = None  # 0 if a slot is free; None if the server is shutting down

    @classmethod
    def from_proto(cls, response: text_generation_pb2.CountTokensResponse) -> TokenCount:
        """Return the counts of a protobuf message; a value that the server did not send is None."""
        queue_time = _seconds(response.estimated_queue_time) if response.HasField("estimated_queue_time") else None
        return cls(
            input_tokens=response.input_tokens,
            max_output_tokens=response.max_output_tokens,
            max_neurons=Decimal(response.max_neurons) if response.max_neurons else None,
            requests_left=response.requests_left if response.HasField("requests_left") else None,
            estimated_queue_time_seconds=queue_time,
        )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
