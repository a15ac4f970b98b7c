"""What the calls of a key cost: one quota unit and one usage record, however often the reply is computed.

The first FREE_RECOMPUTATIONS recomputations of a reply are free. Each later one costs a quota unit, and has its own
record, whose id starts with the id of the first one.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import replace

from llama2_server.admission.quota import Quota
from llama2_server.errors import ServiceError
from llama2_server.generation.accounting import Source, status_of
from llama2_server.generation.coalescing import Subscription
from llama2_server.generation.reply import ReplyStats
from llama2_server.generation.text_stream import OnProgress
from llama2_server.telemetry.call import Call, RecordedUsage
from llama2_server.usage.keys.records import Claim, KeyRecord, KeyState
from llama2_server.usage.ledger import Ledger
from llama2_server.usage.local.writer import Change, no_change
from llama2_server.usage.pricing import ZERO_TOKENS, TokenUsage
from llama2_server.usage.records import UsageRecord

FREE_RECOMPUTATIONS = 3


class KeyAccounting:
    """The costs of one computation of a key's reply; `source` and `read_tokens` change while it runs."""

    def __init__(
        self, ledger: Ledger, quota: Quota, model: str, claim: Claim, fingerprint: Callable[[], str | None]
    ) -> None:
        self._fingerprint = fingerprint
        self._ledger = ledger
        self._quota = quota
        self._model = model
        self.record_of_key = claim.record
        self.is_local = claim.is_local
        """Whether the key holds only on this server."""
        self._claim = claim
        self.source: Source | None = None
        """Where the reply comes from; None before the call has a usage record."""
        self.read_tokens: TokenUsage | None = None
        """The tokens computed when the last reader left; None while the reply has readers."""
        self._records: list[str] = []
        self.server_drains = False
        """Whether the drain of this server broke off the computation."""
        self.left_in_drain = False
        """Whether the last reader left while this server drained."""
        self._finished = False
        self._withdrawn = False

    @property
    def admitted(self) -> bool:
        """Whether quota was consumed, and the usage record opened; False again if the call was rejected after that."""
        return self.source is not None and not self._withdrawn

    @property
    def _is_paid(self) -> bool:
        return self.record_of_key.computations > FREE_RECOMPUTATIONS

    def charge(self, account_id: str) -> AbstractAsyncContextManager[None]:
        """Consume one request of the quota for the body, unless the key has done so."""
        return self._quota.charge(account_id) if self._claim.is_new or self._is_paid else nullcontext()

    def reserve(self, call: Call, account_id: str, most: TokenUsage) -> AbstractAsyncContextManager[None]:
        """Reserve the price of the computation for the body, unless it is free."""
        key = self.record_of_key
        if not self._is_paid and key.state is KeyState.COMPLETE:
            return nullcontext()
        # A reservation needs an id without a record. A record that continues has one, so that call's own id is used.
        request_id = key.request_id if self._claim.is_new else call.request_id
        if self._is_paid and key.state is KeyState.COMPLETE:
            request_id = f"{key.request_id}-{key.computations}"
        return self._ledger.reserved(request_id, account_id, self._model, most)

    def on_progress(self, call: Call) -> OnProgress:
        """Return the function that stores the tokens of the generation, as long as it has a reader."""

        def store(tokens: TokenUsage) -> None:
            if self.read_tokens is None:
                for request_id in self._records:
                    self._ledger.progress(request_id, tokens)

        return store

    @asynccontextmanager
    async def record(self, call: Call, account_id: str, source: Source) -> AsyncIterator["KeyAccounting"]:
        """Bind the key and open its usage record for the body, and write the record with the body's outcome.

        Raises:
            UsageUnavailable: usage cannot be recorded, so the request is rejected.
        """
        status, rejected = "OK", False
        try:
            await self._admit(call, account_id, source)
            yield self
        except BaseException as error:
            left = self.read_tokens is not None and not self.left_in_drain
            drained = self.server_drains and isinstance(error, asyncio.CancelledError) and not left
            status = "UNAVAILABLE" if drained else status_of(error, call)
            rejected = isinstance(error, ServiceError) and error.refunds_quota
            raise
        finally:
            if not self._finished:
                self._withdraw(call) if rejected else self._finish(call, status)

    def add_fingerprint(self) -> None:
        """Store the fingerprint with a key that was claimed before the weights were hashed."""
        if self._finished or self.record_of_key.fingerprint is not None:
            return
        self.record_of_key = replace(self.record_of_key, fingerprint=self._fingerprint())
        if self._records:
            self._ledger.keys.put(self.record_of_key)

    async def complete(self) -> None:
        """Not the end of the reply: `finish` writes the record after the last computed token."""

    def settle(self) -> KeyRecord:
        """Return the key's record of a reply that has ended: one that another replica computed costs nothing."""
        if isinstance(self.source, Subscription) and self.source.generation.joined:
            self.record_of_key = replace(self.record_of_key, cached=True)
        return self.record_of_key

    async def finish(self, call: Call, finish_reason: str, completion: bytes) -> None:
        """Write the record of a complete reply, and wait until it is durable; only then send the last message."""
        self.record_of_key = replace(self.record_of_key, state=KeyState.COMPLETE, completion=completion)
        self._finish(call, finish_reason)
        await self._ledger.commit()

    async def _admit(self, call: Call, account_id: str, source: Source) -> None:
        key = self.record_of_key
        if self._claim.is_new:
            shared = isinstance(source, ReplyStats) or source.shared
            seed = source.seed if isinstance(source, ReplyStats) else source.generation.params.seed
            key = replace(key, seed=seed, cached=shared)
        if key.state is not KeyState.COMPLETE:
            key = replace(key, state=KeyState.OPEN)
            self._records.append(key.request_id)
        if self._is_paid:
            self._records.append(f"{key.request_id}-{key.computations}")
        await self._share_seed(key)
        self.record_of_key = key = replace(key, fingerprint=key.fingerprint or self._fingerprint())
        put = self._ledger.keys.storing(key)
        if self._records:
            call.mark_admitted()
        self.source = source
        for request_id in self._records:
            await self._ledger.admit(request_id, account_id, self._model, put)

    async def _share_seed(self, key: KeyRecord) -> None:
        """Store the seed of another call's generation before its text is sent: all servers must continue this text."""
        claimed = self._claim.record
        if self._claim.is_shared and (key.seed, key.cached) != (claimed.seed, claimed.cached):
            await self._ledger.keys.share(key)

    def _finish(self, call: Call, outcome: str) -> None:
        self._finished = True
        tokens = self._tokens() if self.read_tokens is None else self.read_tokens
        # The weights may have been hashed in the meantime.
        key = replace(self.settle(), fingerprint=self.record_of_key.fingerprint or self._fingerprint())
        if tokens.input_tokens and outcome not in _BY_THE_SERVER and not self.server_drains:
            key = replace(key, computations=key.computations + 1)
        put = self._ledger.keys.storing(key)
        if not self._records:
            self._ledger.keys.put(key)
        for request_id in self._records:
            cached = key.cached and request_id == key.request_id
            record = self._ledger.finish(request_id, outcome, tokens, cached=cached, also=put)
        if self._records:
            self._report(call, record)

    def _withdraw(self, call: Call) -> None:
        self._finished = self._withdrawn = True
        release: Change = self._ledger.keys.releasing(self.record_of_key) if self._claim.is_new else no_change
        for request_id in self._records:
            self._ledger.withdraw(request_id, release)
        call.mark_unrecorded()

    def _report(self, call: Call, record: UsageRecord | None) -> None:
        if record is None:
            call.mark_unrecorded()
            return
        times = self.source.generation.times if isinstance(self.source, Subscription) else None
        usage = RecordedUsage(TokenUsage(record.input_tokens, record.output_tokens), record.neurons, record.cached)
        complete = self.record_of_key.state is KeyState.COMPLETE
        call.set_usage(usage, times, record.outcome if complete else None)

    def _tokens(self) -> TokenUsage:
        match self.source:
            case None:
                return ZERO_TOKENS
            case ReplyStats():
                return self.source.tokens
        generation = self.source.generation
        if self.source.shared or generation.joined:
            return generation.tokens if generation.complete else ZERO_TOKENS
        return generation.tokens if generation.done else generation.computed_tokens


_BY_THE_SERVER = ("INTERNAL", "UNAVAILABLE")
