"""Request coalescing: identical requests that arrive during a generation share it.

A generation belongs to no single request: it runs while at least one request reads it, whichever started it. So it has
no deadline. The deadline of each request ends that request, and the end of the last request cancels the generation.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

logger = logging.getLogger(__name__)


class SharedGeneration(Protocol):
    """A generation that several requests can read; in progress if neither complete nor failed."""

    @property
    def complete(self) -> bool:
        """Whether the whole reply is available."""

    @property
    def failed(self) -> bool:
        """Whether it was rejected, failed or was cancelled."""

    @property
    def unread(self) -> bool:
        """Whether it continues without a reader; other requests then do not share it."""

    async def wait(self) -> None:
        """Wait until it is complete or failed."""

    def cancel(self) -> None:
        """Cancel it; no-op once ended."""


Key = TypeVar("Key", bound=Hashable)
T = TypeVar("T", bound=SharedGeneration)


@dataclass(frozen=True, slots=True)
class Subscription(Generic[T]):
    """One request's claim on a generation."""

    generation: T
    shared: bool
    """Whether another request started it; this one then computes nothing."""
    readers: "Readers"


@dataclass(slots=True)
class Readers:
    """How many requests read a generation."""

    now: int = 0
    ever: int = 0
    on_leave: list[Callable[[], None]] = field(default_factory=list)
    """Called after a request has left."""


@dataclass(slots=True, eq=False)
class _Shared(Generic[T]):
    generation: T
    readers: Readers = field(default_factory=Readers)


class Coalescer(Generic[Key, T]):
    """Generations in progress by key. `on_complete` is called once for each that completes."""

    def __init__(self, on_complete: Callable[[Key, T], Awaitable[None]]) -> None:
        self._on_complete = on_complete
        self._by_key: dict[Key, _Shared[T]] = {}
        self._tasks: dict[asyncio.Task[None], _Shared[T]] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    @contextmanager
    def subscribe(self, key: Key | None, start: Callable[[], T]) -> Iterator[Subscription[T]]:
        """Share the generation of an equal key, or start one; the end of the block unsubscribes.

        Args:
            key: identifies equal requests; None shares nothing, and `on_complete` is not called.
            start: starts a generation; if it raises, nothing was started.
        """
        if key is None:
            entry, shared = _Shared(start()), False
        else:
            entry, shared = self._get_or_start(key, start)
        with self._reading(key, entry):
            yield Subscription(entry.generation, shared, entry.readers)

    @contextmanager
    def join(self, key: Key | None) -> Iterator[Subscription[T] | None]:
        """Share the generation of an equal key, or yield None if no request has started one."""
        entry = self._usable(key)
        if entry is None:
            yield None
            return
        with self._reading(key, entry):
            yield Subscription(entry.generation, True, entry.readers)

    async def close(self) -> None:
        """Wait for running `on_complete` calls; generations still in progress are not reported."""
        tasks = dict(self._tasks)
        for task, entry in tasks.items():
            if not _has_ended(entry):
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @contextmanager
    def _reading(self, key: Key | None, entry: _Shared[T]) -> Iterator[None]:
        """Count a reader for the body; the last one cancels a generation in progress."""
        entry.readers.now += 1
        entry.readers.ever += 1
        try:
            yield
        finally:
            entry.readers.now -= 1
            if entry.readers.now == 0 and not _has_ended(entry):
                self._remove(key, entry)  # first, so that no request subscribes to a cancelled generation
                entry.generation.cancel()
            for call in list(entry.readers.on_leave):
                call()

    def _usable(self, key: Key | None) -> _Shared[T] | None:
        entry = None if key is None else self._by_key.get(key)
        return None if entry is None or entry.generation.failed or entry.generation.unread else entry

    def _get_or_start(self, key: Key, start: Callable[[], T]) -> tuple[_Shared[T], bool]:
        entry = self._usable(key)
        if entry is not None:
            return entry, True
        entry = self._by_key[key] = _Shared(start())
        task = asyncio.create_task(self._report_when_done(key, entry))
        self._tasks[task] = entry
        task.add_done_callback(self._tasks.pop)
        return entry, False

    async def _report_when_done(self, key: Key, entry: _Shared[T]) -> None:
        """Wait for the end. Requests can subscribe until the reply is stored, so that it is generated only once."""
        try:
            await entry.generation.wait()
            if entry.generation.complete:
                await self._on_complete(key, entry.generation)
        except Exception:  # a failure to store the reply must not fail the requests that have it
            logger.exception("storing a complete reply failed")
        finally:
            self._remove(key, entry)

    def _remove(self, key: Key | None, entry: _Shared[T]) -> None:
        """Remove the entry, unless a later one has replaced it."""
        if key is not None and self._by_key.get(key) is entry:
            del self._by_key[key]


def _has_ended(entry: _Shared[T]) -> bool:
    return entry.generation.complete or entry.generation.failed
