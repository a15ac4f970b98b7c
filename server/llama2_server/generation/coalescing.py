"""Single flight: identical requests that come while the first one is generated share its generation.

The generation belongs to nobody: it goes on while anyone reads it, whoever began it. So `make` starts it without a
deadline of its own; the deadline of each reader ends that reader's call, and with the last reader the generation ends.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

logger = logging.getLogger(__name__)


class Shareable(Protocol):
    """What a generation can tell; one that is neither complete nor failed is still on its way."""

    @property
    def complete(self) -> bool:
        """Whether the whole reply is there."""

    @property
    def failed(self) -> bool:
        """Whether it was refused, failed or stopped."""

    async def ended(self) -> None:
        """Wait for its end, whichever it is."""

    def leave(self) -> None:
        """Stop it; nothing happens after the end."""


Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made", bound=Shareable)


@dataclass(frozen=True, slots=True)
class Subscription(Generic[Made]):
    """A reader's place in a flight."""

    generation: Made
    shared: bool
    """Whether another call had begun it: then this one computes nothing."""


@dataclass(slots=True, eq=False)
class _Shared(Generic[Made]):
    generation: Made
    readers: int = 0


class Coalescer(Generic[Key, Made]):
    """The generations under way, by key; `on_complete` hears of each that came to a complete reply, once."""

    def __init__(self, on_complete: Callable[[Key, Made], Awaitable[None]]) -> None:
        self._on_complete = on_complete
        self._flights: dict[Key, _Shared[Made]] = {}
        self._watchers: dict[asyncio.Task[None], _Shared[Made]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    @contextmanager
    def join(self, key: Key | None, make: Callable[[], Made]) -> Iterator[Subscription[Made]]:
        """Share the generation of an equal key, or make one; leaving the block leaves it.

        Args:
            key: what makes requests equal; None shares nothing and tells `on_complete` nothing.
            make: starts a generation; what it raises is raised here, and nothing was begun.
        """
        if key is None:
            flight, shared = _Shared(make()), False
        else:
            flight, shared = self._board(key, make)
        flight.readers += 1
        try:
            yield Subscription(flight.generation, shared)
        finally:
            flight.readers -= 1
            if flight.readers == 0 and not _has_ended(flight):
                self._remove(key, flight)  # first: nobody may join what is being stopped
                flight.generation.leave()

    async def close(self) -> None:
        """Wait for what is being told to `on_complete`; what is still under way is told no more."""
        watchers = dict(self._watchers)
        for watcher, flight in watchers.items():
            if not _has_ended(flight):
                watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)

    def _board(self, key: Key, make: Callable[[], Made]) -> tuple[_Shared[Made], bool]:
        flight = self._flights.get(key)
        if flight is not None and not flight.generation.failed:
            return flight, True
        flight = self._flights[key] = _Shared(make())
        watcher = asyncio.create_task(self._watch(key, flight))
        self._watchers[watcher] = flight
        watcher.add_done_callback(self._watchers.pop)
        return flight, False

    async def _watch(self, key: Key, flight: _Shared[Made]) -> None:
        """See a flight to its end; it can be joined until its reply is kept, so that none is generated twice."""
        try:
            await flight.generation.ended()
            if flight.generation.complete:
                await self._on_complete(key, flight.generation)
        except Exception:  # whatever the hook does, readers have their reply
            logger.exception("a complete reply could not be kept")
        finally:
            self._remove(key, flight)

    def _remove(self, key: Key | None, flight: _Shared[Made]) -> None:
        """Take a flight off the map, if its place was not taken by a later one."""
        if key is not None and self._flights.get(key) is flight:
            del self._flights[key]


def _has_ended(flight: _Shared[Made]) -> bool:
    return flight.generation.complete or flight.generation.failed
