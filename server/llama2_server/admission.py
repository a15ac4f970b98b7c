"""One admitted request and its one ledger record, whatever its end."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llama2_server.errors import ServiceError
from llama2_server.generation import Generation
from llama2_server.ledger.ledger import Ledger
from llama2_server.metering import TokenCounts
from llama2_server.replies import Figures


class Admissions:
    """Sees to it that every admitted request gets its record; `close` waits for the last ones."""

    def __init__(self, ledger: Ledger, model: str) -> None:
        self._ledger = ledger
        self._model = model
        self._open: set[asyncio.Task[None]] = set()

    @contextmanager
    def admit(self, request_id: str, account: str, expired: Callable[[], bool]) -> Iterator["Admission"]:
        """Admit a request for the body of the `with`; the record says how the body ended.

        `expired` tells whether the call's deadline has passed: a cancelled call and an expired one end alike.

        Raises:
            LedgerFull: usage cannot be recorded, so that nothing may be used.
        """
        self._ledger.admit(request_id, account, self._model)
        admission = Admission(self, request_id)
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
            status = "DEADLINE_EXCEEDED" if expired() else "CANCELLED"
            raise
        finally:
            admission.settle(status)

    async def close(self) -> None:
        """Wait for requests whose callers have gone and whose last step is still being computed."""
        await asyncio.gather(*self._open)

    def record(self, request_id: str, outcome: str, counts: TokenCounts, *, served_from_cache: bool) -> None:
        """Write the record."""
        self._ledger.finish(request_id, outcome, counts, served_from_cache=served_from_cache)

    def record_after(self, request_id: str, outcome: str, generation: Generation) -> None:
        """Write the record once the generation has ended, with what was computed by then."""

        async def wait() -> None:
            await generation.ended()
            self.record(request_id, outcome, generation.counts, served_from_cache=False)

        task = asyncio.create_task(wait())
        self._open.add(task)
        task.add_done_callback(self._open.discard)


class Admission:
    """What serves an admitted request, by `served_from_cache` or `served_by`; without either nothing was computed."""

    def __init__(self, admissions: Admissions, request_id: str) -> None:
        self._admissions = admissions
        self._request_id = request_id
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
            outcome = self._stored.finish_reason.name if status == "OK" else status
            self._admissions.record(self._request_id, outcome, self._stored.counts, served_from_cache=True)
        elif self._generation is None:
            self._admissions.record(self._request_id, status, TokenCounts(0, 0), served_from_cache=False)
        else:
            self._settle_generated(self._generation, status)

    def _settle_generated(self, generation: Generation, status: str) -> None:
        outcome = generation.finish_reason.name if generation.finish_reason is not None else status
        if self._shared:
            counts = generation.counts if generation.complete else TokenCounts(0, 0)
            self._admissions.record(self._request_id, outcome, counts, served_from_cache=True)
        else:
            self._admissions.record_after(self._request_id, outcome, generation)
