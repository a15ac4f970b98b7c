"""One admitted request and its one ledger record, whatever its end; telemetry counts what the record says."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from llama2_server.errors import ServiceError
from llama2_server.generation.generation import Generation
from llama2_server.generation.reply import Figures
from llama2_server.telemetry.call import Call, GenerationTimes, RecordedUsage
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.pricing import ZERO_TOKENS, TokenUsage


class UsageRecorder:
    """Sees to it that every admitted request gets its record; `close` waits for the last ones."""

    def __init__(self, ledger: Ledger, model: str) -> None:
        self._ledger = ledger
        self._model = model
        self._open: set[asyncio.Task[None]] = set()

    @contextmanager
    def admit(self, call: Call, account: str) -> Iterator["RecordedRequest"]:
        """Admit a request for the body of the `with`; the record says how the body ended.

        Raises:
            UsageJournalFull: usage cannot be recorded, so that nothing may be used.
        """
        self._ledger.admit(call.request_id, account, self._model)
        call.mark_admitted()
        admission = RecordedRequest(self, call)
        status = "OK"
        try:
            yield admission
        except ServiceError as error:
            status = error.code.name
            raise
        except Exception:
            status = "INTERNAL"
            raise
        except BaseException:
            # A cancelled call and an expired one end alike.
            status = "DEADLINE_EXCEEDED" if call.expired() else "CANCELLED"
            raise
        finally:
            admission.settle(status)

    async def close(self) -> None:
        """Wait for requests whose callers have gone and whose last step is still being computed."""
        await asyncio.gather(*self._open)

    def record(
        self,
        call: Call,
        status: str,
        counts: TokenUsage,
        *,
        finish_reason: str | None = None,
        cached: bool = False,
        times: GenerationTimes | None = None,
    ) -> None:
        """Write the record: a complete reply's outcome is its finish reason, any other's how its call ended."""
        outcome = finish_reason or status
        record = self._ledger.finish(call.request_id, outcome, counts, cached=cached)
        if record is not None:
            tokens = TokenUsage(record.input_tokens, record.output_tokens)
            usage = RecordedUsage(tokens, record.neurons, record.cached)
            call.set_usage(usage, times, finish_reason)

    def record_after(self, call: Call, status: str, generation: Generation) -> None:
        """Write the record once the generation has ended, with what was computed by then."""
        finish_reason = _finish_reason(generation)

        async def wait() -> None:
            await generation.ended()
            counts, times = generation.counts, generation.times
            self.record(call, status, counts, finish_reason=finish_reason, times=times)

        task = asyncio.create_task(wait())
        self._open.add(task)
        task.add_done_callback(self._open.discard)


class RecordedRequest:
    """What serves an admitted request, by `served_from_cache` or `served_by`; without either nothing was computed."""

    def __init__(self, admissions: UsageRecorder, call: Call) -> None:
        self._admissions = admissions
        self._call = call
        self._stored: Figures | None = None
        self._generation: Generation | None = None
        self._shared = False

    def served_from_cache(self, figures: Figures) -> None:
        """The reply came out of the response cache."""
        self._stored = figures

    def served_by(self, generation: Generation, *, shared: bool) -> None:
        """The reply comes from a generation; the call that began it pays, one that shares it does not."""
        self._generation = generation
        self._shared = shared

    def settle(self, status: str) -> None:
        """Record the request; `status` is how its call ended, where the reply is not complete."""
        if self._stored is not None:
            reason = self._stored.finish_reason.name if status == "OK" else None
            counts = self._stored.counts
            self._admissions.record(self._call, status, counts, finish_reason=reason, cached=True)
        elif self._generation is None:
            self._admissions.record(self._call, status, ZERO_TOKENS)
        elif self._shared:
            self._settle_shared(self._generation, status)
        else:
            self._admissions.record_after(self._call, status, self._generation)

    def _settle_shared(self, generation: Generation, status: str) -> None:
        self._admissions.record(
            self._call,
            status,
            generation.counts if generation.complete else ZERO_TOKENS,
            finish_reason=_finish_reason(generation),
            cached=True,
            times=generation.times,
        )


def _finish_reason(generation: Generation) -> str | None:
    return None if generation.finish_reason is None else generation.finish_reason.name
