"""One request from start to end: account, validation, reply, completion."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_server.admission.accounts import Authenticator
from llama2_server.admission.quota import Quota
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.api.validation.request_validator import RequestValidator
from llama2_server.card import ModelCard
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.sequence import FinishReason
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.errors import QuotaStoreUnavailable
from llama2_server.generation.rejection import retry_times
from llama2_server.generation.reply import Reply, ReplyStats
from llama2_server.generation.reply_source import ReplyRequest, ReplySource
from llama2_server.generation.response_cache import CacheKey, ResponseCache
from llama2_server.generation.supervised_engine import SupervisedEngine
from llama2_server.receipts.keys import ReceiptKeys
from llama2_server.receipts.receipt import Statement, sign
from llama2_server.telemetry.call import CALL, Attribute
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import TokenUsage, decimal_text, neurons

AnyRequestT = TypeVar("AnyRequestT", pb.GenerateRequest, pb.CountTokensRequest)
T = TypeVar("T")
_FINISH_REASONS = {
    FinishReason.END_OF_SEQUENCE: pb.FINISH_REASON_END_OF_SEQUENCE,
    FinishReason.STOP_SEQUENCE: pb.FINISH_REASON_STOP_SEQUENCE,
    FinishReason.MAX_TOKENS: pb.FINISH_REASON_MAX_TOKENS,
}


# Fields that change how a reply is sent, but not the reply.
UNSIGNED_FIELDS = frozenset(("idempotency_key", "resume_after_characters", "stream", "no_cache"))


class TextGenerationServicer(text_generation_pb2_grpc.TextGenerationServiceServicer):
    """TextGenerationService. `Generate` gathers what `GenerateStream` sends: both take the same path.

    `fingerprint` names everything that decides the text of a reply, also in the keys of the response cache.
    """

    def __init__(
        self,
        card: ModelCard,
        authenticator: Authenticator,
        tokenizer: Tokenizer,
        quota: Quota,
        response_cache: ResponseCache | None,
        ledger: Ledger,
        queue: RequestQueue,
        engine: SupervisedEngine,
        fingerprint: Fingerprint,
        receipt_keys: ReceiptKeys | None,
    ) -> None:
        self._card = card
        self._authenticator = authenticator
        self._caches_responses = response_cache is not None
        self._fingerprint = fingerprint
        self._receipt_keys = receipt_keys
        self._validator = RequestValidator(card, tokenizer)
        # One thread: several would only compete with the event loop for the interpreter.
        self._validation_thread = ThreadPoolExecutor(1, thread_name_prefix="validation")
        self._quota = quota
        self._queue = queue
        self._replies = ReplySource(tokenizer, quota, response_cache, ledger, queue, engine, card.name)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        """Return the whole reply in one message."""
        async with self.serve(request, context, streaming=False) as reply:
            text = "".join([delta async for delta in reply.deltas()])
            return pb.GenerateResponse(response=text, completion=self._completion(request, reply.stats()))

    async def GenerateStream(  # type: ignore[override]  # writes to its context instead of yielding
        self, request: pb.GenerateRequest, context: Any
    ) -> None:
        """Send the reply while it is generated; the last message has the completion."""
        async with self.serve(request, context, streaming=True) as reply:
            async for delta in reply.deltas():
                await context.write(pb.GenerateStreamResponse(response=delta))
            await context.write(pb.GenerateStreamResponse(completion=self._completion(request, reply.stats())))

    async def CountTokens(self, request: pb.CountTokensRequest, context: Any) -> pb.CountTokensResponse:
        """Return the input tokens of a request, the output tokens that fit, and what a call would meet now."""
        account_id = self._authenticator.authenticate(context.invocation_metadata()).id
        CALL.get().account_id = account_id
        counts = await self._validate(request, self._validator.validate_count_tokens)
        response = pb.CountTokensResponse(input_tokens=counts.input_tokens, max_output_tokens=counts.max_output_tokens)
        if counts.max_output_tokens:
            tokens = TokenUsage(counts.input_tokens, counts.priced_output_tokens)
            response.max_neurons = decimal_text(neurons(tokens, self._card.neuron_costs))
        with suppress(QuotaStoreUnavailable):
            response.requests_left = (await self._quota.status(account_id)).remaining
        if not self._queue.closed:
            response.estimated_queue_time.CopyFrom(_duration(self._queue.estimated_wait_seconds(account_id)))
        return response

    async def close(self) -> None:
        """Wait until every record is written and every complete reply is stored; call it after the last request."""
        await self._replies.close()
        self._validation_thread.shutdown(wait=False)

    @asynccontextmanager
    async def serve(self, request: pb.GenerateRequest, context: Any, *, streaming: bool) -> AsyncIterator[Reply]:
        """Validate the request and yield its reply."""
        call, deadline = CALL.get(), _deadline(context)
        account = self._authenticator.authenticate(context.invocation_metadata())
        call.account_id = account.id
        with call.phase("validation"):
            validate = partial(self._validator.validate_generate, streaming=streaming)
            prompt, params = await self._validate(request, validate)
            key = None
            if self._caches_responses and not request.no_cache:
                seeded = request.HasField("seed")
                model = f"{self._card.name} {self._fingerprint.cache_identity}"
                key = CacheKey.of(account.id, model, prompt, params, seeded=seeded)
        call.request = _span_attributes(params, streaming=streaming)
        reply_request = ReplyRequest(account.id, prompt, params, key, deadline)
        times = retry_times(self._queue, self._quota, account.id, reply_request.call_key)
        async with times, self._replies.reply(call, reply_request) as reply:
            yield reply

    async def _validate(self, request: AnyRequestT, validate: Callable[[AnyRequestT], T]) -> T:
        """Validate the request; a costly one in another thread, so that the event loop serves other calls."""
        if not self._validator.is_costly(request):
            return validate(request)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._validation_thread, validate, request)

    def _completion(self, request: pb.GenerateRequest, stats: ReplyStats) -> pb.Completion:
        price = Decimal(0) if stats.cached else neurons(stats.tokens, self._card.neuron_costs)
        completion = pb.Completion(
            finish_reason=_FINISH_REASONS[stats.finish_reason],
            usage=pb.Usage(
                input_tokens=stats.tokens.input_tokens,
                output_tokens=stats.tokens.output_tokens,
                neurons=decimal_text(price),
                reused_input_tokens=stats.reused_input_tokens,
            ),
            seed=stats.seed,
            cached=stats.cached,
            request_id=CALL.get().request_id,
            fingerprint=self._fingerprint.value,
            timings=pb.Timings(
                queue_time=_duration(stats.queue_seconds),
                time_to_first_token=_duration(stats.time_to_first_token_seconds),
                total_time=_duration(stats.total_seconds),
            ),
        )
        if self._receipt_keys is not None:
            receipt = sign(self._receipt_keys, _statement(request, completion, stats.text))
            completion.receipt.CopyFrom(pb.Receipt(**receipt._asdict()))
        return completion


def _statement(request: pb.GenerateRequest, completion: pb.Completion, text: str) -> Statement:
    """Return what a receipt states about a reply of this call."""
    fields = MessageToDict(request, preserving_proto_field_name=True)
    return Statement(
        request={name: value for name, value in fields.items() if name not in UNSIGNED_FIELDS},
        text=text,
        seed=completion.seed,
        fingerprint=completion.fingerprint or None,
        input_tokens=completion.usage.input_tokens,
        output_tokens=completion.usage.output_tokens,
        neurons=completion.usage.neurons,
        account_id=CALL.get().account_id or "",
        request_id=completion.request_id,
        time=datetime.now(UTC),
    )


def _deadline(context: Any) -> float | None:
    """Return the call's deadline as a time of the event loop's clock, or None."""
    now, remaining = asyncio.get_running_loop().time(), context.time_remaining()
    return None if remaining is None else now + remaining


def _span_attributes(params: GenerationParams, *, streaming: bool) -> dict[str, Attribute]:
    """Return the attributes of a request for its span: only numbers and flags, with OpenTelemetry's names."""
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
