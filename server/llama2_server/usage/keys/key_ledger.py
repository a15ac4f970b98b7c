"""The idempotency keys of one server: in the usage store if there is one and it answers, otherwise on this server."""

import logging
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from llama2_server.errors import UsageUnavailable
from llama2_server.usage.errors import StoreUnavailable
from llama2_server.usage.keys import statements
from llama2_server.usage.keys.local_keys import LocalKeys
from llama2_server.usage.keys.records import Claim, KeyRecord
from llama2_server.usage.keys.shared_keys import SharedKeys
from llama2_server.usage.local.writer import Change, Writer

logger = logging.getLogger(__name__)

Check = Callable[[KeyRecord], None]
_UNAVAILABLE = "the store of the idempotency keys does not answer; retry"


class KeyLedger:
    """The keys. The local database has all keys that this server has admitted, also if a store has them.

    Args:
        local: the keys in the local database.
        shared: the keys in the usage store; None without a store.
        writer: the thread that changes the local database.
        falls_back: whether keys hold only on this server while the store does not answer; otherwise their calls are
            rejected.
    """

    def __init__(self, local: LocalKeys, shared: SharedKeys | None, writer: Writer, *, falls_back: bool) -> None:
        self._local = local
        self._shared = shared
        self._writer = writer
        self._falls_back = falls_back
        self._outage_logged = False

    @property
    def instance(self) -> str:
        """The name of this server."""
        return self._local.instance

    def on_wanted(self, call: Callable[[str], None]) -> None:
        """Let the ledger call this with the digest of a key that this server holds, while another server waits."""
        if self._shared is not None:
            self._shared.on_wanted = call

    async def claim(self, record: KeyRecord, check: Check) -> Claim:
        """Claim a key, or return its record. While another server works on the key, wait.

        The caller calls `end` at last. `check` raises if the record is not that of the caller's request.

        Raises:
            UsageUnavailable: the database or the store does not accept the claim.
        """
        if self._shared is None:
            return _checked(await self._local.claim(record), check)
        known = await self._local.find(record.digest)
        try:
            claim = await self._shared.claim(record, known, check)
        except StoreUnavailable as error:
            self._fall_back(error)
            return _checked(replace(await self._local.claim(record), is_local=True), check)
        self._outage_logged = False
        return claim

    async def find(self, digest: str, check: Check) -> Claim | None:
        """Return the claim of a key that an earlier call has used; None otherwise. Waits as `claim`.

        Raises:
            UsageUnavailable: the database or the store cannot be read.
        """
        known = await self._local.find(digest)
        if self._shared is None:
            return None if known is None else _checked(Claim(known, is_new=False), check)
        try:
            if known is None:
                return await self._shared.find(digest, check)
            return await self._shared.claim(known, known, check)
        except StoreUnavailable as error:
            if known is None:  # the store may have it
                raise UsageUnavailable(_UNAVAILABLE) from error
            self._fall_back(error)
            return _checked(Claim(known, is_new=False, is_local=True), check)

    async def share(self, record: KeyRecord) -> None:
        """Store a change of a shared key now, before a client gets text that depends on it.

        Raises:
            UsageUnavailable: the store does not answer.
        """
        if self._shared is not None:
            try:
                await self._shared.share(record)
            except StoreUnavailable as error:
                raise UsageUnavailable(_UNAVAILABLE) from error

    async def end(self, claim: Claim, *, admitted: bool) -> None:
        """End the work on a claimed key; a new key whose call was not admitted is free again."""
        rejected = claim.is_new and not admitted
        if rejected and not claim.is_shared:
            await self._local.release(claim.record)
        if claim.is_shared and self._shared is not None:
            self._shared.end(claim.record.digest, claim.record.request_id if rejected else None)

    def storing(self, record: KeyRecord) -> Change:
        """Return the change of the local database that stores a record, unless the stored one has a higher state."""

        def change(connection: sqlite3.Connection) -> None:
            statements.put(connection, record)
            if self._shared is not None:
                statements.mark(connection, record.digest)

        return change

    def releasing(self, record: KeyRecord) -> Change:
        """Return the change of the local database that deletes a record, unless it is complete."""
        return partial(statements.release, record=record)

    def put(self, record: KeyRecord) -> None:
        """Store the record later, unless the stored one has a higher state."""
        self._writer.submit(self.storing(record), keep=True)

    async def purge(self) -> None:
        """Delete the expired records."""
        await self._local.purge()
        if self._shared is not None:
            await self._shared.purge()

    def start(self, ended_servers: list[str]) -> None:
        """Start to renew the shared keys; the keys of `ended_servers` are free."""
        if self._shared is not None:
            self._shared.start(ended_servers)

    async def close(self, timeout_seconds: float) -> None:
        """Send the last keys to the store for up to this time."""
        if self._shared is not None:
            await self._shared.close(timeout_seconds)

    def _fall_back(self, error: StoreUnavailable) -> None:
        if not self._falls_back:
            raise UsageUnavailable(_UNAVAILABLE) from error
        if not self._outage_logged:
            logger.warning("idempotency keys hold only on this server until the usage store answers")
        self._outage_logged = True


def _checked(claim: Claim, check: Check) -> Claim:
    check(claim.record)
    return claim
