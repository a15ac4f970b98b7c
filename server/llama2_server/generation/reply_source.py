"""The source of a valid request's reply: the response cache, a running generation, or a new one.

Only a new generation needs the queue. A request passes the queue, then the quota, then its account's budget, and gets
its usage record. So a rejected request leaves no record, and costs no quota: what it consumed is given back.
"""

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from llama2_server.admission.quota import Quota
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.admission.reservation import Reservation
from llama2_server.admission.retry_times import CallIdentity
from llama2_server.engine.sampling import GenerationParams
from llama2_server.engine.text.tokenizer import Tokenizer
from llama2_server.generation.accounting import Accounting, Recorded, Source, UsageRecorder
from llama2_server.generation.coalescing import Coalescer, Subscription
from llama2_server.generation.generation import Generation
from llama2_server.generation.prompt import Prompt
from llama2_server.generation.replicas.shared_replies import SharedReplies
from llama2_server.generation.reply import CachedReply, GeneratedReply, RecordedReply
from llama2_server.generation.response_cache import CacheEntry, CacheKey, ResponseCache
from llama2_server.generation.supervised_engine import SupervisedEngine
from llama2_server.generation.text_stream import OnProgress
from llama2_server.telemetry.call import Call
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import TokenUsage


@dataclass(frozen=True, slots=True)
class ReplyRequest:
    """A valid request for a reply."""

    account_id: str
    prompt: Prompt
    params: GenerationParams
    cache_key: CacheKey | None
    """Identifies equal requests; None neither reads a cached or running reply nor stores one."""
    deadline: float | None
    """The call's deadline by the event loop's clock, or None."""
    connection: str = ""
    """Equal for calls over one connection; empty if it is not known."""
    outlives_call: bool = False
    """Whether the generation can continue after the call's deadline."""

    @property
    def most_tokens(self) -> TokenUsage:
        """The most tokens that a new generation computes; they have the highest price."""
        return TokenUsage(len(self.prompt.token_ids), self.params.max_tokens)

    @property
    def identity(self) -> CallIdentity:
        """How a rejected call is known when it returns: it has the same request, or the same connection."""
        key = hash((self.account_id, self.prompt, replace(self.params, seed=0)))
        return CallIdentity(key, f"{self.account_id} {self.connection}" if self.connection else "")


class ReplySource:
    """Admits requests and yields their replies."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        quota: Quota,
        response_cache: ResponseCache | None,
        ledger: Ledger,
        queue: RequestQueue,
        engine: SupervisedEngine,
        model: str,
        shared: SharedReplies,
    ) -> None:
        """`model` is the name in the usage records."""
        self._tokenizer = tokenizer
        self._response_cache = response_cache
        self._ledger = ledger
        self._queue = queue
        self._engine = engine
        self._shared = shared
        quota.expected_calls = queue.expected_calls
        self._usage = UsageRecorder(ledger, quota, model)
        self._coalescer: Coalescer[CacheKey, Generation] = Coalescer(self._store_response)

    @asynccontextmanager
    async def reply(
        self, call: Call, request: ReplyRequest, accounting: Accounting | None = None
    ) -> AsyncIterator[RecordedReply]:
        """Admit the request and yield its reply. After the body, a generation without other readers is cancelled.

        Without `accounting`, the call costs one request of the quota, and gets its own usage record.

        Raises:
            ServiceError: the request was rejected, or an error of the body.
        """
        self._queue.check_open()
        self._ledger.check_capacity()
        accounting = accounting or self._usage
        if (cached := await self.cached_reply(request.cache_key)) is not None:
            async with self._admitted(accounting, call, request, cached.stats()) as recorded:
                self._count_hit()
                yield RecordedReply(cached, recorded.complete)
            return
        request, elsewhere = await self._find_elsewhere(request)
        with self._coalescer.join(request.cache_key) as running:
            if running is not None:
                async with self._admitted(accounting, call, request, running) as recorded:
                    yield _generated_reply(call, recorded, running)
                return
        # Nothing awaits between the look for a running generation and the reservation.
        with ExitStack() as reserved:
            reservation = self._reserve(request, reserved, elsewhere=elsewhere)
            # An account without a budget awaits nothing in `reserve`.
            reserve = accounting.reserve(call, request.account_id, request.most_tokens)
            async with accounting.charge(request.account_id), reserve:

                def start() -> Generation:
                    if reservation is None:
                        self._queue.check_open()
                    else:
                        self._queue.confirm(reservation)
                    generation = self._start(accounting.on_progress(call), request, reservation)
                    reserved.pop_all()  # the generation's task releases it
                    return generation

                with self._coalescer.subscribe(request.cache_key, start) as subscription:
                    # An equal request may have been faster while this one consumed its quota.
                    if subscription.shared and reservation is not None:
                        self._queue.release(reservation)
                    async with accounting.record(call, request.account_id, subscription) as recorded:
                        yield _generated_reply(call, recorded, subscription)

    async def close(self) -> None:
        """Wait until every record is written and every complete reply is stored; call it after the last request."""
        await self._usage.close()
        await self._coalescer.close()
        await self._shared.close()

    def _reserve(self, request: ReplyRequest, reserved: ExitStack, *, elsewhere: bool) -> Reservation | None:
        """Reserve a slot, which the stack releases; another replica's generation needs none. Raises as the queue."""
        if elsewhere:
            self._queue.end_expectation(request.identity)
            return None
        reservation = self._queue.reserve(request.account_id, request.deadline, request.identity)
        reserved.callback(self._queue.release, reservation)
        return reservation

    @asynccontextmanager
    async def _admitted(
        self, accounting: Accounting, call: Call, request: ReplyRequest, source: Source
    ) -> AsyncIterator[Recorded]:
        """Consume quota and open the usage record, for a request that needs no slot."""
        self._queue.end_expectation(request.identity)
        async with (
            accounting.charge(request.account_id),
            accounting.record(call, request.account_id, source) as recorded,
        ):
            yield recorded

    async def _find_elsewhere(self, request: ReplyRequest) -> tuple[ReplyRequest, bool]:
        """Return the request with the seed of all replicas, and whether one of them computes its reply."""
        if request.cache_key is None:
            return request, False
        seed, elsewhere = await self._shared.find(request.cache_key, request.params.seed)
        if seed != request.params.seed:
            request = replace(request, params=replace(request.params, seed=seed))
        return request, elsewhere

    def _start(self, on_progress: OnProgress, request: ReplyRequest, reservation: Reservation | None) -> Generation:
        shared = None
        if request.cache_key is not None:
            shared = self._shared.reply(request.cache_key, request.params.seed, self._stored_meanwhile)
        generation = Generation(request.prompt, request.params, self._tokenizer, on_progress, shared)
        # Later requests can share a generation with a key, and may wait for it longer than this one.
        deadline = request.deadline if request.cache_key is None and not request.outlives_call else None
        generation.start(self._queue, reservation, self._engine, request.account_id, deadline)
        return generation

    async def cached_reply(self, key: CacheKey | None) -> CachedReply | None:
        """Return the reply of an equal request from the response cache, or None."""
        if self._response_cache is None or key is None:
            return None
        entry = await self._response_cache.get(key)
        return None if entry is None else CachedReply(entry)

    async def _stored_meanwhile(self, key: CacheKey) -> CacheEntry | None:
        """Look for the reply again."""
        return None if self._response_cache is None else await self._response_cache.peek(key)

    def _count_hit(self) -> None:
        if self._response_cache is not None:
            self._response_cache.hits += 1

    async def _store_response(self, key: CacheKey, generation: Generation) -> None:
        if self._response_cache is not None and generation.finish_reason is not None and not generation.unread:
            tokens, seed = generation.tokens, generation.params.seed
            finish_reason = generation.finish_reason.name
            entry = CacheEntry(generation.text, finish_reason, tokens.input_tokens, tokens.output_tokens, seed)
            await self._response_cache.put(key, entry)


def _generated_reply(call: Call, recorded: Recorded, subscription: Subscription[Generation]) -> RecordedReply:
    reply = GeneratedReply(subscription.generation, shared=subscription.shared, started_at=call.started_at)
    return RecordedReply(reply, recorded.complete)
