"""One interface over `Client` and `SyncClient`, so that one test runs with both."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from llama2_client import Client, Reply, SyncClient

KINDS = (Client, SyncClient)


class Twin:
    """A client of either kind. Synchronous calls run in a thread, because the server needs the event loop."""

    def __init__(self, client: Client | SyncClient) -> None:
        self.client = client

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(
        cls, kind: type[Client] | type[SyncClient], address: str, **options: Any
    ) -> AsyncIterator[Twin]:
        """Open a client and close it at the end."""
        twin = cls(kind(address, **options))
        try:
            yield twin
        finally:
            if isinstance(twin.client, Client):
                await twin.client.aclose()
            else:
                await asyncio.to_thread(twin.client.close)

    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Return the result of a method."""
        if isinstance(self.client, Client):
            return await getattr(self.client, method)(*arguments, **options)
        return await asyncio.to_thread(getattr(self.client, method), *arguments, **options)

    async def read(self, deltas: list[str], *arguments: Any, **options: Any) -> Reply:
        """Stream a reply, append its deltas to the list and return the reply."""
        if isinstance(self.client, Client):
            async with self.client.stream(*arguments, **options) as stream:
                async for delta in stream:
                    deltas.append(delta)  # noqa: PERF401 - a failed stream must leave its deltas
            return stream.reply
        return await asyncio.to_thread(self._read_sync, deltas, *arguments, **options)

    async def converse(self, *questions: str, system: str | None = None) -> tuple[Any, ...]:
        """Send the questions as turns of one chat, and return its history."""
        if isinstance(self.client, Client):
            chat = self.client.chat(system)
            for question in questions:
                await chat.send(question)
            return chat.history
        sync_chat = self.client.chat(system)
        for question in questions:
            await asyncio.to_thread(sync_chat.send, question)
        return sync_chat.history

    def _read_sync(self, deltas: list[str], *arguments: Any, **options: Any) -> Reply:
        assert isinstance(self.client, SyncClient)
        with self.client.stream(*arguments, **options) as stream:
            deltas.extend(stream)  # a failed stream leaves its deltas
        return stream.reply
