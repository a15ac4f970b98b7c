"""The gRPC channels of an async client, one per event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import grpc

from llama2_client.settings import ClientSettings


@dataclass(frozen=True)
class _LoopChannel:
    channel: grpc.aio.Channel
    closer: AsyncGenerator[None, None]  # closing it closes the channel


class Channels:
    """A channel for each event loop that uses the client, because gRPC binds a channel to one event loop.

    A channel is closed with its client, or at the end of its event loop: `asyncio.run` closes async generators, and
    one of them closes the channel. Otherwise gRPC would report the channel's last events to a closed event loop.
    """

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._open: dict[asyncio.AbstractEventLoop, _LoopChannel] = {}

    def current(self) -> grpc.aio.Channel:
        """Return the channel of the running event loop; it connects at its first call."""
        loop = asyncio.get_running_loop()
        opened = self._open.get(loop)
        if opened is None:
            for other in list(self._open):
                if other.is_closed():
                    self._open.pop(other, None)
            opened = self._open[loop] = self._open_channel(loop)
        return opened.channel

    async def aclose(self) -> None:
        """Close the channel of the running event loop and cancel its calls."""
        opened = self._open.get(asyncio.get_running_loop())
        if opened is not None:
            await opened.closer.aclose()

    def _open_channel(self, loop: asyncio.AbstractEventLoop) -> _LoopChannel:
        target, credentials, options = self._settings.target, self._settings.credentials, self._settings.channel_options
        if credentials is None:
            channel = grpc.aio.insecure_channel(target, options)
        else:
            channel = grpc.aio.secure_channel(target, credentials, options)
        closer = self._close_at_end(loop, channel)
        with contextlib.suppress(StopIteration):
            anext(closer).__await__().send(None)  # run to its `yield`: a generator that never ran closes nothing
        return _LoopChannel(channel, closer)

    async def _close_at_end(
        self, loop: asyncio.AbstractEventLoop, channel: grpc.aio.Channel
    ) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._open.pop(loop, None)
            await channel.close()
