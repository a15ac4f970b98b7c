"""The idempotency keys that all servers of a usage store share.

A server holds a key in the store from its claim to the end of the run. In the meantime it changes the key only in the
local database. The end of the run sends the key to the store, off the path of the calls. Changes that could
not be sent are sent later, also after a restart.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Protocol, TypeVar

from llama2_server.usage.errors import StoreUnavailable
from llama2_server.usage.keys import statements
from llama2_server.usage.keys.key_store import KeyStore
from llama2_server.usage.keys.records import Claim, HeldKey, KeyRecord, KeyState
from llama2_server.usage.local.writer import DatabaseUnavailable, Writer

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
RENEW_SECONDS = 1.0
BATCH_KEYS = 500

Result = TypeVar("Result")


class StoreState(Protocol):
    """The outcome of the last operation on the usage store."""

    @property
    def up(self) -> bool:
        """Whether the last operation succeeded."""

    def record_failure(self, error: Exception) -> None:
        """Record that an operation failed."""


class SharedKeys:
    """The keys that this server holds, and a task that renews them; `start` creates it, and `close` ends it.

    Args:
        store: the keys of all servers.
        state: the state of the store.
        writer: the thread that changes the local database.
        server: the name of this server.
        now: returns the time.
    """

    def __init__(
        self, store: KeyStore, state: StoreState, writer: Writer, server: str, now: Callable[[], datetime]
    ) -> None:
        self.on_wanted: Callable[[str], None] = lambda digest: None
        """Called with the digest of a key that this server holds, while another server waits for it."""
        self._store = store
        self._state = state
        self._writer = writer
        self._server = server
        self._now = now
        self._held: set[str] = set()
        self._withdrawn: dict[str, set[str]] = {}  # ids of rejected calls by digest, which the store may still have
        self._endings: dict[str, asyncio.Task[None]] = {}
        self._may_hold = False
        self._ended_servers: Sequence[str] = ()
        self._task: asyncio.Task[None] | None = None

    def start(self, ended_servers: Sequence[str]) -> None:
        """Start the task; the keys of `ended_servers` are free."""
        self._ended_servers = ended_servers
        self._task = asyncio.create_task(self._run())

    async def claim(self, record: KeyRecord, known: KeyRecord | None, check: Callable[[KeyRecord], None]) -> Claim:
        """Claim and hold a key, or hold the key of an earlier call; while another server holds it, wait.

        Args:
            record: the record of this call.
            known: the record of the key in the local database.
            check: raises if the key's record is not that of the caller's request.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        digest = record.digest
        await self._check_up(digest)
        self._held.add(digest)
        try:
            while True:
                held = await self._answer(self._store.claim(known or record, self._server, self._now()))
                self._check(held, check)
                if held.holder == self._server:
                    break
                await asyncio.sleep(POLL_SECONDS)
        except BaseException:
            self.end(digest, None if known else record.request_id)
            raise
        self._withdrawn.pop(digest, None)  # the store has replaced the key of a rejected call
        found = held.record
        if known is not None and found.request_id != known.request_id:  # used here and elsewhere during an outage
            self.end(digest)
            return Claim(known, is_new=False, is_local=True)
        # Another request id with the state CLAIMED is from a server that ended before it said whether it took quota.
        return Claim(found, is_new=known is None and found.request_id == record.request_id, is_shared=True)

    async def find(self, digest: str, check: Callable[[KeyRecord], None]) -> Claim | None:
        """Hold a key that another server has claimed; None for an unknown key. Waits and raises as `claim`."""
        await self._check_up(digest)
        self._held.add(digest)
        held = None
        try:
            while held is None or held.holder != self._server:
                if held is not None:
                    await asyncio.sleep(POLL_SECONDS)
                held = await self._answer(self._store.find(digest, self._server, self._now()))
                if held is None:
                    self._held.discard(digest)
                    return None
                self._check(held, check)
        except BaseException:
            self.end(digest)
            raise
        self._withdrawn.pop(digest, None)
        return Claim(held.record, is_new=False, is_shared=True)

    async def share(self, record: KeyRecord) -> None:
        """Store a key that this server holds now, not at its end; raises StoreUnavailable."""
        await self._answer(self._store.put([record], self._server, self._now(), holds=True))

    def end(self, digest: str, withdrawn: str | None = None) -> None:
        """End holding a key: send it to the store, or delete it if the call of the request `withdrawn` was rejected."""
        self._held.discard(digest)
        if withdrawn is not None:
            self._withdrawn.setdefault(digest, set()).add(withdrawn)
        if digest not in self._endings:
            task = self._endings[digest] = asyncio.create_task(self._end(digest))
            task.add_done_callback(lambda _: self._endings.pop(digest, None))

    async def purge(self) -> None:
        """Delete the expired keys of all servers."""
        if self._state.up:
            await self._quietly(self._store.purge(self._now()))

    async def close(self, timeout_seconds: float) -> None:
        """Send the last keys for up to this time, and end the task."""
        if self._endings and timeout_seconds:
            await asyncio.wait(list(self._endings.values()), timeout=timeout_seconds)
        tasks = [task for task in (self._task, *self._endings.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _check(self, held: HeldKey, check: Callable[[KeyRecord], None]) -> None:
        # Another server may still reject the call that claimed the key, and then the key is free.
        if held.record.state is not KeyState.CLAIMED or held.holder == self._server:
            check(held.record)

    async def _check_up(self, digest: str) -> None:
        if (ending := self._endings.get(digest)) is not None:  # it would end the new hold
            await asyncio.wait([ending])
        if not self._state.up:
            raise StoreUnavailable("the usage store does not answer", temporary=True)
        self._may_hold = True

    async def _answer(self, operation: Awaitable[Result]) -> Result:
        try:
            return await operation
        except StoreUnavailable as error:
            self._state.record_failure(error)
            raise

    async def _quietly(self, operation: Awaitable[None]) -> bool:
        try:
            await self._answer(operation)
        except StoreUnavailable:
            return False
        return True

    async def _end(self, digest: str) -> None:
        if (request_ids := self._withdrawn.get(digest)) is None:
            await self._quietly(self._send(digest))
        # A withdrawal that fails is repeated, unless another call of the key gets it before.
        elif await self._quietly(self._store.withdraw(digest, request_ids, self._server)):
            self._withdrawn.pop(digest, None)

    async def _send(self, digest: str) -> None:
        """Send what the local database has of a key that this server no longer works on."""
        marked = await self._marked(digest)
        if marked:
            await self._put(marked, holds=False)
        else:
            await self._store.release(digest, self._server)

    async def _put(self, marked: list[tuple[int, KeyRecord]], *, holds: bool) -> None:
        await self._store.put([record for _, record in marked], self._server, self._now(), holds=holds)
        try:
            await self._writer.run(partial(statements.unmark, sent=marked))
        except DatabaseUnavailable:  # they are sent again
            return

    async def _marked(self, digest: str | None = None) -> list[tuple[int, KeyRecord]]:
        try:
            return await self._writer.read(partial(statements.unsent, count=BATCH_KEYS, digest=digest))
        except DatabaseUnavailable:
            return []

    async def _run(self) -> None:
        while True:
            try:
                if self._state.up:
                    await self._round()
            except StoreUnavailable as error:
                self._state.record_failure(error)
            except Exception:  # the task must go on
                logger.exception("renewing idempotency keys failed")
            await asyncio.sleep(RENEW_SECONDS)

    async def _round(self) -> None:
        """Renew the keys that this server holds, end the others, and send what has not been sent."""
        if self._ended_servers:
            await self._store.release_all(self._ended_servers)
            self._ended_servers = ()
        if self._may_hold or self._held:
            await self._renew()
        marked = await self._marked()
        for holds in (True, False):
            # An ending sends its own key: what was read before it would end the hold with an older state.
            sendable = [one for one in marked if one[1].digest not in self._endings]
            batch = [(revision, record) for revision, record in sendable if (record.digest in self._held) is holds]
            if batch := [one for one in batch if one[1].state is not KeyState.CLAIMED]:
                await self._put(batch, holds=holds)

    async def _renew(self) -> None:
        """Renew the keys that this server holds, and end the others that the store has for it."""
        self._may_hold = bool(self._held)
        withdrawn = list(self._withdrawn)
        try:
            renewed = await self._store.renew(self._server)
        except StoreUnavailable:
            self._may_hold = True  # the next round ends what an ending could not
            raise
        for digest, wanted in renewed.items():
            if digest not in self._held:
                self._may_hold = True
                self.end(digest)
            elif wanted:
                self.on_wanted(digest)
        for digest in withdrawn:
            if digest not in renewed and digest not in self._held:  # another server holds it, or it is deleted
                self._withdrawn.pop(digest, None)
