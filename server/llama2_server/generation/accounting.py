"""Write one usage record per recorded request, however its call ends. Telemetry counts the record's values."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from llama2_server.errors import ServiceError
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

    @contextmanager
    def record(self, call: Call, account_id: str) -> Iterator["RecordedRequest"]:
        """Admit a request to the ledger, run the body, and write the record with the body's outcome.

        Raises:
            UsageJournalFull: usage cannot be recorded, so the request is rejected.
        """
        self._ledger.admit(call.request_id, account_id, self._model)
        call.mark_admitted()
        request = RecordedRequest(self, call)
        status = "OK"
        try:
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
        if record is not None:
            recorded_tokens = TokenUsage(record.input_tokens, record.output_tokens)
            usage = RecordedUsage(recorded_tokens, record.neurons, record.cached)
            call.set_usage(usage, times, finish_reason)

    def write_when_done(self, call: Call, status: str, generation: Generation) -> None:
        """Write the record after the generation has ended, with the tokens that it has computed."""
        finish_reason = _finish_reason(generation)

        async def wait() -> None:
            await generation.wait()
            self.write(call, status, generation.tokens, finish_reason=finish_reason, times=generation.times)

        task = asyncio.create_task(wait())
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)


class RecordedRequest:
    """A request that has a usage record. `set_cached` or `set_generation` sets the source of its reply, once known."""

    def __init__(self, recorder: UsageRecorder, call: Call) -> None:
        self._recorder = recorder
        self._call = call
        self._cached: ReplyStats | None = None
        self._generation: Generation | None = None
        self._shared = False

    def set_cached(self, stats: ReplyStats) -> None:
        """Record that the reply comes from the response cache."""
        self._cached = stats

    def set_generation(self, generation: Generation, *, shared: bool) -> None:
        """Record that the reply comes from a generation; only the call that started the generation is billed."""
        self._generation = generation
        self._shared = shared

    def finish(self, status: str) -> None:
        """Write the record; `status` is the call's status."""
        if self._cached is not None:
            finish_reason = self._cached.finish_reason.name if status == "OK" else None
            self._recorder.write(self._call, status, self._cached.tokens, finish_reason=finish_reason, cached=True)
        elif self._generation is None:
            self._recorder.write(self._call, status, ZERO_TOKENS)
        elif self._shared:
            self._finish_shared(self._generation, status)
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
