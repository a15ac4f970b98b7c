"""One request from start to end: account, validation, reply, completion."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from prometheus_client.registry import Collector

from llama2.v1 import text_generation_pb2 as pb
from llama2.v1 import text_generation_pb2_grpc
from llama2_server.admission.accounts import Authenticator
from llama2_server.admission.quota import Quota
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.api.completion import Completions, compared_fields, duration
from llama2_server.api.validation.request_validator import RequestValidator
from llama2_server.card import ModelCard
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.errors import QuotaStoreUnavailable
from llama2_server.generation.rejection import retry_times
from llama2_server.generation.replicas.shared_replies import SharedReplies
from llama2_server.generation.reply import Reply, ReplyStats
from llama2_server.generation.reply_source import ReplyRequest, ReplySource
from llama2_server.generation.response_cache import CacheKey, ResponseCache
from llama2_server.generation.supervised_engine import SupervisedEngine
from llama2_server.idempotency.keyed_replies import IdempotencyOptions, KeyedReplies
from llama2_server.idempotency.request import KeyedRequest, key_digest
from llama2_server.receipts.keys import ReceiptKeys
from llama2_server.telemetry.call import CALL, Attribute, Call
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import TokenUsage, decimal_text, neurons

AnyRequestT = TypeVar("AnyRequestT", pb.GenerateRequest, pb.CountTokensRequest)
T = TypeVar("T")


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
        idempotency: IdempotencyOptions,
        shared: SharedReplies,
    ) -> None:
        self._card = card
        self._authenticator = authenticator
        self._caches_responses = response_cache is not None
        self._fingerprint = fingerprint
        self._completions = Completions(card, fingerprint, receipt_keys)
        self._validator = RequestValidator(card, tokenizer)
        # One thread: several would only compete with the event loop for the interpreter.
        self._validation_thread = ThreadPoolExecutor(1, thread_name_prefix="validation")
        self._quota = quota
        self._queue = queue
        self._replies = ReplySource(tokenizer, quota, response_cache, ledger, queue, engine, card.name, shared)
        self._shared = shared
        self._keyed = KeyedReplies(self._replies, ledger, quota, queue, card.name, fingerprint, idempotency)

    @property
    def collectors(self) -> tuple[Collector, ...]:
        """The metrics of calls with an idempotency key, and of coalescing across replicas."""
        return self._keyed.metrics, self._shared

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        """Return the whole reply in one message."""
        async with self.serve(request, context, streaming=False) as reply:
            text = "".join([delta async for delta in reply.deltas()])
            return pb.GenerateResponse(response=text, completion=self._completions.of(request, reply))

    async def GenerateStream(  # type: ignore[override]  # writes to its context instead of yielding
        self, request: pb.GenerateRequest, context: Any
    ) -> None:
        """Send the reply while it is generated; the last message has the completion."""
        async with self.serve(request, context, streaming=True) as reply:
            first = pb.GenerateStreamResponse()
            if request.resume_after_characters:
                first.resumed_after_characters = request.resume_after_characters
            await self._send(request, context, reply, first)

    async def _send(
        self, request: pb.GenerateRequest, context: Any, reply: Reply, message: pb.GenerateStreamResponse
    ) -> None:
        """Send each delta, the first one in `message`, and then the completion."""
        async for delta in reply.deltas():
            message.response = delta
            await context.write(message)
            message = pb.GenerateStreamResponse()
        message.completion.CopyFrom(self._completions.of(request, reply))
        await context.write(message)

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
            response.estimated_queue_time.CopyFrom(duration(self._queue.estimated_wait_seconds(account_id)))
        return response

    async def close(self) -> None:
        """Wait until every record is written and every complete reply is stored; call it after the last request."""
        await self._keyed.close()
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
            if self._caches_responses and (request.idempotency_key or not request.no_cache):
                seeded = request.HasField("seed")
                model = f"{self._card.name} {self._fingerprint.cache_identity}"
                key = CacheKey.of(account.id, model, prompt, params, seeded=seeded)
        call.request = _span_attributes(params, streaming=streaming)
        reply_request = ReplyRequest(
            account.id, prompt, params, None if request.no_cache else key, deadline, connection=context.peer()
        )
        times = retry_times(self._queue, self._quota, account.id, reply_request.identity)
        async with times, self._source(call, request, reply_request, key) as reply:
            yield reply

    async def _validate(self, request: AnyRequestT, validate: Callable[[AnyRequestT], T]) -> T:
        """Validate the request; a costly one in another thread, so that the event loop serves other calls."""
        if not self._validator.is_costly(request):
            return validate(request)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._validation_thread, validate, request)

    def _source(
        self, call: Call, request: pb.GenerateRequest, reply_request: ReplyRequest, cache_key: CacheKey | None
    ) -> AbstractAsyncContextManager[Reply]:
        """Return the source of the reply; `cache_key` also of a request that does not use the response cache."""
        if not request.HasField("idempotency_key"):
            return self._replies.reply(call, reply_request)

        def describe(request_id: str, stats: ReplyStats, is_local: bool) -> bytes:
            completion = self._completions.describe(request, request_id, stats, idempotency_local=is_local)
            return completion.SerializeToString()

        digest = key_digest(self._card.name, reply_request.account_id, request.idempotency_key)
        fields, resume_after = compared_fields(request), request.resume_after_characters
        return self._keyed.reply(call, KeyedRequest(reply_request, digest, fields, cache_key, resume_after, describe))


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
