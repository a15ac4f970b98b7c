"""The idempotency keys that only the servers of one data directory share, in the local database."""

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import TypeVar

from llama2_server.errors import UsageUnavailable
from llama2_server.usage.keys import statements
from llama2_server.usage.keys.records import Claim, KeyRecord, KeyState
from llama2_server.usage.local.writer import DatabaseUnavailable, Writer

POLL_SECONDS = 0.05
# A claim lasts only while its server checks queue and quota. After this time, that server has ended.
CLAIM_SECONDS = 5.0

Result = TypeVar("Result")
_UNAVAILABLE = "usage cannot be recorded now; retry"


class LocalKeys:
    """The keys; each claim is one transaction.

    Args:
        writer: the thread that changes the local database.
        instance: the name of this server.
        now: returns the time.
    """

    def __init__(self, writer: Writer, instance: str, now: Callable[[], datetime]) -> None:
        self.instance = instance
        self._writer = writer
        self._now = now

    async def claim(self, record: KeyRecord) -> Claim:
        """Claim a key, or return its record. While another server checks queue and quota for it, wait.

        Raises:
            UsageUnavailable: the database does not accept the claim.
        """
        deadline = asyncio.get_running_loop().time() + CLAIM_SECONDS
        while True:
            found = await self._run(partial(statements.claim, record=record, now=self._now()))
            if found.request_id == record.request_id:
                return Claim(found, is_new=True)
            if found.state is not KeyState.CLAIMED:
                return Claim(found, is_new=False)
            # This server has at most one claim per key: an older one was not released, because the disk was full.
            if found.instance == self.instance or asyncio.get_running_loop().time() >= deadline:
                await self._run(partial(statements.take_over, found=found, record=record))
            else:
                await asyncio.sleep(POLL_SECONDS)

    async def find(self, digest: str) -> KeyRecord | None:
        """Return the record of a key that has a usage record; None otherwise.

        Raises:
            UsageUnavailable: the database cannot be read.
        """
        try:
            found = await self._writer.read(lambda connection: statements.find(connection, digest, self._now()))
        except DatabaseUnavailable as error:
            raise UsageUnavailable(_UNAVAILABLE) from error
        return None if found is None or found.state is KeyState.CLAIMED else found

    async def release(self, record: KeyRecord) -> None:
        """Release a key whose call was rejected."""
        with suppress(DatabaseUnavailable):  # the next claim takes it over
            await self._writer.run(lambda connection: statements.release(connection, record))

    async def purge(self) -> None:
        """Delete the expired records."""
        with suppress(DatabaseUnavailable):  # the next time
            await self._writer.run(lambda connection: statements.purge(connection, self._now()))
            await self._writer.run(statements.purge_marks)

    async def _run(self, change: Callable[[sqlite3.Connection], Result]) -> Result:
        try:
            return await self._writer.run(change)
        except DatabaseUnavailable as error:
            raise UsageUnavailable(_UNAVAILABLE) from error
