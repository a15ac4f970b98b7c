"""The source of a reply with an idempotency key: the key's run on this server, or a new run.

A run claims the key in the usage database before it looks at response cache, queue and quota. What it finds decides:

- a new key: the reply is generated, or comes from the response cache, as without a key;
- a complete reply: its text comes from the response cache, or is computed again with the recorded seed;
- an attempt that broke off: the reply is computed with the recorded seed, on the same usage record.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from llama2_server.admission.quota import Quota
from llama2_server.admission.request_queue import RequestQueue
from llama2_server.config.settings import Settings
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.errors import FingerprintChanged, FingerprintPending, IdempotencyKeyUnknown
from llama2_server.generation.reply import CachedReply
from llama2_server.generation.reply_source import ReplySource
from llama2_server.idempotency.key_accounting import KeyAccounting
from llama2_server.idempotency.metrics import KeyMetrics
from llama2_server.idempotency.request import KeyedRequest, check_fields, field_digests
from llama2_server.idempotency.run import KeyedReply, KeyRun
from llama2_server.telemetry.call import Call
from llama2_server.usage.keys.records import Claim, KeyRecord, KeyState
from llama2_server.usage.ledger import Ledger

FINGERPRINT_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class IdempotencyOptions:
    """What the operator decides; times in seconds."""

    retention_seconds: float
    """How long a key is stored."""
    resume_window_seconds: float
    """How long a generation continues without a reader."""

    @classmethod
    def of(cls, settings: Settings) -> "IdempotencyOptions":
        """Return the options of the settings."""
        return cls(settings.idempotency_retention_seconds, settings.resume_window_seconds)


class KeyedReplies:
    """The runs of this server by key."""

    def __init__(
        self,
        source: ReplySource,
        ledger: Ledger,
        quota: Quota,
        queue: RequestQueue,
        model: str,
        fingerprint: Fingerprint,
        options: IdempotencyOptions,
    ) -> None:
        """`fingerprint` names what decides a text; without a value, the same text cannot be computed again."""
        self._source = source
        self._ledger = ledger
        self._quota = quota
        self._queue = queue
        self._model = model
        self._fingerprint = fingerprint
        self._options = options
        self._runs: dict[str, KeyRun] = {}
        self._adding_fingerprints: asyncio.Task[None] | None = None
        self.metrics = KeyMetrics()
        """The results of the calls with a key."""
        queue.on_contention = self._free_slots
        ledger.keys.on_wanted(self._on_wanted)

    @asynccontextmanager
    async def reply(self, call: Call, request: KeyedRequest) -> AsyncIterator[KeyedReply]:
        """Join the run of the key, or start it, and yield the reply.

        Raises:
            IdempotencyKeyReused: another request used the key.
            IdempotencyKeyUnknown: the call resumes a reply of an unknown key.
            FingerprintChanged: this server cannot compute the reply of the key.
            FingerprintPending: this server does not know yet whether it can compute the reply of the key.
            ServiceError: the request was rejected, or an error of the body.
        """
        self._queue.check_open()
        while True:
            run = self._runs.get(request.key_digest)
            if run is not None and run.stopping:
                await run.wait()
                continue
            if run is None:
                run = self._start(call, request)
            with run.reading(call):
                record = await run.bound()
                if record is None and run.call is not call:
                    continue  # the other call did not get the key, so this one tries
                if record is not None and run.call is not call:
                    with self.metrics.conflicts():
                        check_fields(record, request.fields)
                    self.metrics.count("joined")
                yield KeyedReply(run, await run.admitted(), call, request.resume_after)
                return

    async def close(self) -> None:
        """End the runs without readers; call it after the last request."""
        if self._adding_fingerprints is not None:
            self._adding_fingerprints.cancel()
        runs = list(self._runs.values())
        for run in runs:
            run.stop()
        await asyncio.gather(*(run.wait() for run in runs))

    def _start(self, call: Call, request: KeyedRequest) -> KeyRun:
        run = self._runs[request.key_digest] = KeyRun(call, request, self._queue, self._options.resume_window_seconds)
        run.start(self._serve, self._remove)
        if self._fingerprint.is_pending and self._adding_fingerprints is None:
            self._adding_fingerprints = asyncio.create_task(self._add_fingerprints())
        return run

    async def _add_fingerprints(self) -> None:
        """Store the fingerprint with the running keys once it is known, so that their replies survive this process."""
        while self._fingerprint.is_pending:  # noqa: ASYNC110 - another thread ends it
            await asyncio.sleep(FINGERPRINT_POLL_SECONDS)
        for run in self._runs.values():
            run.add_fingerprint()

    def _remove(self, run: KeyRun) -> None:
        if self._runs.get(run.request.key_digest) is run:
            del self._runs[run.request.key_digest]

    def _free_slots(self) -> None:
        for run in list(self._runs.values()):
            run.free_slot()

    def _on_wanted(self, digest: str) -> None:
        if (run := self._runs.get(digest)) is not None:
            run.hand_over()

    async def _serve(self, run: KeyRun) -> None:
        """Claim the key of a run, and deliver its reply."""
        claim = await self._claim(run.call, run.request)
        accounting = KeyAccounting(self._ledger, self._quota, self._model, claim, lambda: self._fingerprint.value)
        if claim.is_local:
            self.metrics.count_fallback()
        try:
            run.bind(claim.record, accounting)
            if claim.is_new:
                self.metrics.count("new")
                await self._generate(run, accounting, run.request.reply.params.seed, stores=True)
            else:
                await self._serve_again(run, accounting, claim.record)
        finally:
            await self._ledger.keys.end(claim, admitted=accounting.admitted)

    async def _claim(self, call: Call, request: KeyedRequest) -> Claim:
        """Return the key's record, and whether this call claimed it; raises as `reply`."""

        def check(record: KeyRecord) -> None:
            check_fields(record, request.fields)

        with self.metrics.conflicts():
            if not request.resume_after:
                return await self._ledger.keys.claim(self._new_record(call, request), check)
            claim = await self._ledger.keys.find(request.key_digest, check)
            if claim is None:
                raise IdempotencyKeyUnknown
            return claim

    def _new_record(self, call: Call, request: KeyedRequest) -> KeyRecord:
        salt = secrets.token_hex(16)
        return KeyRecord(
            digest=request.key_digest,
            request_id=call.request_id,
            instance=self._ledger.keys.instance,
            state=KeyState.CLAIMED,
            seed=request.reply.params.seed,
            fingerprint=self._fingerprint.value,
            salt=salt,
            field_digests=field_digests(salt, request.fields),
            expires_at=datetime.now(UTC) + timedelta(seconds=self._options.retention_seconds),
        )

    async def _serve_again(self, run: KeyRun, accounting: KeyAccounting, record: KeyRecord) -> None:
        """Deliver the reply of a key that an earlier call has used."""
        cached = await self._source.cached_reply(run.request.cache_key)
        if cached is not None and cached.stats().seed == record.seed:
            self.metrics.count("cached")
            await self._deliver_cached(run, accounting, cached)
            return
        is_pending = self._fingerprint.is_pending  # read before the value, which another thread sets first
        fingerprint = self._fingerprint.value
        if fingerprint is None or fingerprint != record.fingerprint:
            if record.state is KeyState.COMPLETE or run.request.resume_after:
                if fingerprint is None and is_pending and record.fingerprint is not None:
                    raise FingerprintPending
                raise FingerprintChanged
            accounting.record_of_key = replace(record, fingerprint=fingerprint)  # no client has text of it
        self.metrics.count("recomputed")
        await self._generate(run, accounting, record.seed, stores=False)

    async def _deliver_cached(self, run: KeyRun, accounting: KeyAccounting, cached: CachedReply) -> None:
        record = accounting.record_of_key
        if record.state is KeyState.COMPLETE:
            run.complete(cached, record.completion)
            return
        async with accounting.record(run.call, run.request.reply.account_id, cached.stats()):
            await run.deliver(cached, accounting)

    async def _generate(self, run: KeyRun, accounting: KeyAccounting, seed: int, *, stores: bool) -> None:
        """Deliver the reply of the queue, or for a new key also of the response cache or of another call."""
        reply = run.request.reply
        request = replace(
            reply,
            params=replace(reply.params, seed=seed),
            cache_key=reply.cache_key if stores else None,
            outlives_call=True,
        )
        async with self._source.reply(run.call, request, accounting) as recorded:
            await run.deliver(recorded.reply, accounting)
