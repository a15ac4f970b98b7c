"""Write one usage record per recorded request, however its call ends. Telemetry counts the record's values."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Protocol

from llama2_server.admission.quota import Quota
from llama2_server.errors import ServiceError
from llama2_server.generation.coalescing import Subscription
from llama2_server.generation.generation import Generation
from llama2_server.generation.reply import ReplyStats
from llama2_server.generation.text_stream import OnProgress
from llama2_server.telemetry.call import Call, GenerationTimes, RecordedUsage
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import ZERO_TOKENS, TokenUsage

Source = Subscription[Generation] | ReplyStats
"""Where a reply comes from: a generation, or the response cache."""


class Recorded(Protocol):
    """A request that has a usage record."""

    async def complete(self) -> None:
        """Wait until the record of a complete reply is durable; only then send the last message."""


class Accounting(Protocol):
    """What a call costs: quota and a usage record."""

    def charge(self, account_id: str) -> AbstractAsyncContextManager[None]:
        """Consume one request of the quota for the body, as `Quota.charge`."""

    def reserve(self, call: Call, account_id: str, most: TokenUsage) -> AbstractAsyncContextManager[None]:
        """Reserve the price of the most tokens that the call can compute for the body, as `Ledger.reserved`."""

    def record(self, call: Call, account_id: str, source: Source) -> AbstractAsyncContextManager[Recorded]:
        """Record the request, run the body, and write the record with the body's outcome."""

    def on_progress(self, call: Call) -> OnProgress:
        """Return the function that takes the tokens of the call's generation, on the engine's thread."""


def status_of(error: BaseException, call: Call) -> str:
    """Return the name of the status with which an exception ends a call."""
    if isinstance(error, ServiceError):
        return error.code.name
    if isinstance(error, Exception):
        return "INTERNAL"
    # A cancelled call and an expired call raise the same exception.
    return "DEADLINE_EXCEEDED" if call.expired() else "CANCELLED"


class UsageRecorder:
    """Writes one record per recorded request; `close` waits for the last records."""

    def __init__(self, ledger: Ledger, quota: Quota, model: str) -> None:
        self._ledger = ledger
        self._quota = quota
        self._model = model
        self._pending: set[asyncio.Task[None]] = set()

    def charge(self, account_id: str) -> AbstractAsyncContextManager[None]:
        """Consume one request of the quota for the body, as `Quota.charge`."""
        return self._quota.charge(account_id)

    def reserve(self, call: Call, account_id: str, most: TokenUsage) -> AbstractAsyncContextManager[None]:
        """Reserve the price of the most tokens that the call can compute for the body, as `Ledger.reserved`."""
        return self._ledger.reserved(call.request_id, account_id, self._model, most)

    def on_progress(self, call: Call) -> OnProgress:
        """Return the function that stores the tokens of the call's generation."""
        return partial(self._ledger.progress, call.request_id)

    @asynccontextmanager
    async def record(self, call: Call, account_id: str, source: Source) -> AsyncIterator["RecordedRequest"]:
        """Admit a request to the ledger, run the body, and write the record with the body's outcome.

        Only the request that started a generation is billed.

        Raises:
            UsageUnavailable: usage cannot be recorded, so the request is rejected.
        """
        request = RecordedRequest(self, call, source)
        status = "OK"
        call.mark_admitted()
        try:
            await self._ledger.admit(call.request_id, account_id, self._model)
            yield request
        except BaseException as error:
            status = status_of(error, call)
            raise
        finally:
            request.finish(status)

    async def commit(self) -> None:
        """Wait until all records that have been written are durable."""
        await self._ledger.commit()

    async def close(self) -> None:
        """Wait for requests whose client has disconnected while their last step is still computed."""
        await asyncio.gather(*self._pending)

    def write(
        self,
        call: Call,
        status: str,
        tokens: TokenUsage,
        *,
        finish_reason: str | None = None,
        cached: bool = False,
        times: GenerationTimes | None = None,
    ) -> None:
        """Write the record; its outcome is the finish reason of a complete reply, otherwise the call's status."""
        record = self._ledger.finish(call.request_id, finish_reason or status, tokens, cached=cached)
        if record is None:  # the ledger has not admitted it
            call.mark_unrecorded()
            return
        usage = RecordedUsage(TokenUsage(record.input_tokens, record.output_tokens), record.neurons, record.cached)
        call.set_usage(usage, times, finish_reason)

    def write_generation(self, call: Call, status: str, generation: Generation, *, shared: bool = False) -> None:
        """Write the record of a generation that has ended, or was `shared` with the call that started it."""
        shared = shared or generation.joined
        tokens = generation.tokens if generation.complete or not shared else ZERO_TOKENS
        finish_reason = None if generation.finish_reason is None else generation.finish_reason.name
        self.write(call, status, tokens, finish_reason=finish_reason, cached=shared, times=generation.times)

    def write_when_done(self, call: Call, status: str, generation: Generation) -> None:
        """Write the record after the generation has ended, with the tokens that it has computed."""

        async def wait() -> None:
            await generation.wait()
            self.write_generation(call, status, generation)

        task = asyncio.create_task(wait())
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)


class RecordedRequest:
    """A request that has a usage record."""

    def __init__(self, recorder: UsageRecorder, call: Call, source: Source) -> None:
        self._recorder = recorder
        self._call = call
        self._source = source
        self._finished = False

    async def complete(self) -> None:
        """Write the record of a complete reply, and wait until it is durable; only then send the last message."""
        if isinstance(self._source, Subscription) and not self._source.shared:
            await self._source.generation.wait()
        self.finish("OK")
        await self._recorder.commit()

    def finish(self, status: str) -> None:
        """Write the record, unless it is written; `status` is the call's status."""
        if self._finished:
            return
        self._finished = True
        if isinstance(self._source, ReplyStats):
            finish_reason = self._source.finish_reason.name if status == "OK" else None
            self._recorder.write(self._call, status, self._source.tokens, finish_reason=finish_reason, cached=True)
        elif self._source.shared:
            self._recorder.write_generation(self._call, status, self._source.generation, shared=True)
        elif self._source.generation.done:
            self._recorder.write_generation(self._call, status, self._source.generation)
        else:
            self._recorder.write_when_done(self._call, status, self._source.generation)
