"""Write one usage record per recorded request, however its call ends. Telemetry counts the record's values."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llama2_server.errors import ServiceError
from llama2_server.generation.coalescing import Subscription
from llama2_server.generation.generation import Generation
from llama2_server.generation.reply import ReplyStats
from llama2_server.telemetry.call import Call, GenerationTimes, RecordedUsage
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import ZERO_TOKENS, TokenUsage


class UsageRecorder:
    """Writes one record per recorded request; `close` waits for the last records."""

    def __init__(self, ledger: Ledger, model: str) -> None:
        self._ledger = ledger
        self._model = model
        self._pending: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def record(
        self, call: Call, account_id: str, subscription: Subscription[Generation] | None = None
    ) -> AsyncIterator["RecordedRequest"]:
        """Admit a request to the ledger, run the body, and write the record with the body's outcome.

        With a subscription, the reply comes from its generation, and only the request that started it is billed.

        Raises:
            UsageUnavailable: usage cannot be recorded, so the request is rejected.
        """
        request = RecordedRequest(self, call, subscription)
        status = "OK"
        call.mark_admitted()
        try:
            await self._ledger.admit(call.request_id, account_id, self._model)
            yield request
        except ServiceError as error:
            status = error.code.name
            raise
        except Exception:
            status = "INTERNAL"
            raise
        except BaseException:
            # A cancelled call and an expired call raise the same exception.
            status = "DEADLINE_EXCEEDED" if call.expired() else "CANCELLED"
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

    def write_generation(self, call: Call, status: str, generation: Generation) -> None:
        """Write the record of a generation that has ended."""
        finish_reason = _finish_reason(generation)
        self.write(call, status, generation.tokens, finish_reason=finish_reason, times=generation.times)

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

    def __init__(self, recorder: UsageRecorder, call: Call, subscription: Subscription[Generation] | None) -> None:
        self._recorder = recorder
        self._call = call
        self._cached: ReplyStats | None = None
        self._generation = None if subscription is None else subscription.generation
        self._shared = subscription is not None and subscription.shared
        self._finished = False

    def set_cached(self, stats: ReplyStats) -> None:
        """Record that the reply comes from the response cache."""
        self._cached = stats

    async def complete(self) -> None:
        """Write the record of a complete reply, and wait until it is durable; only then send the last message."""
        if self._generation is not None and not self._shared:
            await self._generation.wait()
        self.finish("OK")
        await self._recorder.commit()

    def finish(self, status: str) -> None:
        """Write the record, unless it is written; `status` is the call's status."""
        if self._finished:
            return
        self._finished = True
        if self._cached is not None:
            finish_reason = self._cached.finish_reason.name if status == "OK" else None
            self._recorder.write(self._call, status, self._cached.tokens, finish_reason=finish_reason, cached=True)
        elif self._generation is None:
            self._recorder.write(self._call, status, ZERO_TOKENS)
        elif self._shared:
            self._finish_shared(self._generation, status)
        elif self._generation.done:
            self._recorder.write_generation(self._call, status, self._generation)
        else:
            self._recorder.write_when_done(self._call, status, self._generation)

    def _finish_shared(self, generation: Generation, status: str) -> None:
        self._recorder.write(
            self._call,
            status,
            generation.tokens if generation.complete else ZERO_TOKENS,
            finish_reason=_finish_reason(generation),
            cached=True,
            times=generation.times,
        )


def _finish_reason(generation: Generation) -> str | None:
    return None if generation.finish_reason is None else generation.finish_reason.name
