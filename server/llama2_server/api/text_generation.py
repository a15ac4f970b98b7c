"""One request from top to bottom: account, validation, quota, response cache, waiting line, engine, metering."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

from google.protobuf.duration_pb2 import Duration

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_server.admission.accounts import Account, Authenticator
from llama2_server.admission.quota import Quota
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.api.validation import RequestValidator
from llama2_server.card import ModelCard
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.generation.accounting import UsageRecorder
from llama2_server.generation.coalescing import Coalescer
from llama2_server.generation.generation import Generation
from llama2_server.generation.prompt import Prompt
from llama2_server.generation.reply import CachedReply, Figures, GeneratedReply, Reply
from llama2_server.generation.response_cache import CacheEntry, CacheKey, ResponseCache
from llama2_server.generation.supervised_engine import SupervisedEngine
from llama2_server.telemetry.call import CALL, Attribute
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import decimal_text, neurons

_FINISH_REASONS = {
    FinishReason.END_OF_SEQUENCE: pb.FINISH_REASON_END_OF_SEQUENCE,
    FinishReason.STOP_SEQUENCE: pb.FINISH_REASON_STOP_SEQUENCE,
    FinishReason.MAX_TOKENS: pb.FINISH_REASON_MAX_TOKENS,
}


@dataclass(frozen=True, slots=True)
class Parts:
    """What the servicers work with."""

    card: ModelCard
    accounts: Authenticator
    tokenizer: Tokenizer
    quota: Quota
    cache: ResponseCache | None
    ledger: Ledger
    slots: RequestQueue
    engine: SupervisedEngine
    fingerprint: str
    """Tells the weights from others."""


class TextGenerationServicer(text_generation_pb2_grpc.TextGenerationServiceServicer):
    """`Generate` is `GenerateStream`, gathered: both run the same path."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._validator = RequestValidator(parts.card, parts.tokenizer)
        self._admissions = UsageRecorder(parts.ledger, parts.card.name)
        self._flights: Coalescer[CacheKey, Generation] = Coalescer(self._keep)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        """The whole reply in one message."""
        async with self._reply(request, context, streaming=False) as reply:
            text = "".join([delta async for delta in reply.deltas()])
            return pb.GenerateResponse(response=text, completion=self._completion(reply.figures()))

    async def GenerateStream(  # type: ignore[override]  # writes to its context instead of yielding
        self, request: pb.GenerateRequest, context: Any
    ) -> None:
        """The reply as it comes; the last message carries the completion."""
        async with self._reply(request, context, streaming=True) as reply:
            async for delta in reply.deltas():
                await context.write(pb.GenerateStreamResponse(response=delta))
            await context.write(pb.GenerateStreamResponse(completion=self._completion(reply.figures())))

    async def CountTokens(self, request: pb.CountTokensRequest, context: Any) -> pb.CountTokensResponse:
        """The input tokens of a request, and what they leave for the reply."""
        CALL.get().account_id = self._parts.accounts.authenticate(context.invocation_metadata()).id
        input_tokens, max_output_tokens = self._validator.token_count(request)
        return pb.CountTokensResponse(input_tokens=input_tokens, max_output_tokens=max_output_tokens)

    async def close(self) -> None:
        """Wait until every reply is kept and every request recorded; nothing may run any more."""
        await self._admissions.close()
        await self._flights.close()

    @asynccontextmanager
    async def _reply(self, request: pb.GenerateRequest, context: Any, *, streaming: bool) -> AsyncIterator[Reply]:
        """The reply to a request; leaving the block, for whatever reason, stops what nobody else reads."""
        parts = self._parts
        call, deadline = CALL.get(), _deadline(context)
        account = parts.accounts.authenticate(context.invocation_metadata())
        call.account_id = account.id
        with call.phase("validation"):
            prompt, params = self._validator.generation(request, streaming=streaming)
        call.request = _facts(params, streaming=streaming)
        # What cannot be served now costs no quota; what the quota refuses is not recorded.
        parts.slots.check_open()
        parts.ledger.check_capacity(call.request_id, account.id, parts.card.name)
        await parts.quota.take(account.id)
        with self._admissions.admit(call, account.id) as admission:
            key = self._cache_key(request, account, prompt, params)
            if parts.cache is not None and key is not None and (cached := await parts.cache.get(key)) is not None:
                stored = CachedReply(cached)
                admission.served_from_cache(stored.figures())
                yield stored
                return

            def start() -> Generation:
                on_progress = partial(parts.ledger.progress, call.request_id)
                generation = Generation(prompt, params, parts.tokenizer, on_progress)
                parts.slots.check_wait(account.id, deadline)
                # Others may join a generation that has a key, and wait for it longer than this call would.
                generation.start(parts.slots, parts.engine, account, deadline if key is None else None)
                return generation

            with self._flights.join(key, start) as seat:
                admission.served_by(seat.generation, shared=seat.shared)
                yield GeneratedReply(seat.generation, shared=seat.shared, begun=call.started_at)

    def _cache_key(
        self, request: pb.GenerateRequest, account: Account, prompt: Prompt, params: GenerationParams
    ) -> CacheKey | None:
        """What makes requests equal; None where this one shall be equal to none."""
        if self._parts.cache is None or request.no_cache:
            return None
        seeded = request.HasField("seed")
        model = f"{self._parts.card.name} {self._parts.fingerprint}"
        return CacheKey.of(account.id, model, prompt.token_ids, raw=prompt.raw, params=params, seeded=seeded)

    async def _keep(self, key: CacheKey, generation: Generation) -> None:
        """Put a complete reply into the response cache."""
        if self._parts.cache is not None and generation.finish_reason is not None:
            counts = generation.counts
            reason, seed = generation.finish_reason.name, generation.params.seed
            reply = CacheEntry(generation.text, reason, counts.input_tokens, counts.output_tokens, seed)
            await self._parts.cache.put(key, reply)

    def _completion(self, figures: Figures) -> pb.Completion:
        price = Decimal(0) if figures.cached else neurons(figures.counts, self._parts.card.neuron_costs)
        return pb.Completion(
            finish_reason=_FINISH_REASONS[figures.finish_reason],
            usage=pb.Usage(
                input_tokens=figures.counts.input_tokens,
                output_tokens=figures.counts.output_tokens,
                neurons=decimal_text(price),
                reused_input_tokens=figures.reused_input_tokens,
            ),
            seed=figures.seed,
            cached=figures.cached,
            request_id=CALL.get().request_id,
            timings=pb.Timings(
                queue_time=_duration(figures.queue_seconds),
                time_to_first_token=_duration(figures.time_to_first_token_seconds),
                total_time=_duration(figures.total_seconds),
            ),
        )


def _deadline(context: Any) -> float | None:
    """The call's deadline by the loop's clock; None if the caller waits for ever."""
    now, remaining = asyncio.get_running_loop().time(), context.time_remaining()
    return None if remaining is None else now + remaining


def _facts(params: GenerationParams, *, streaming: bool) -> dict[str, Attribute]:
    """What telemetry may know of a request: numbers, by OpenTelemetry's names."""
    return {
        "gen_ai.request.stream": streaming,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
    }


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
