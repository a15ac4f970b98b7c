"""Generations that produce one word per second in a slot of a real request queue, and calls that share them."""

import asyncio
from collections.abc import AsyncIterator, Callable

from llama2_server.admission.request_queue import RequestQueue
from llama2_server.errors import InternalError, ServiceError
from llama2_server.generation.coalescing import Coalescer

WORDS = ["Once ", "upon ", "a ", "time"]


class ScriptedGeneration:
    """Waits for a slot, produces `WORDS`, and then completes, or fails with `error`."""

    def __init__(self, queue: RequestQueue, error: ServiceError | None = None) -> None:
        self.words: list[str] = []
        self.unread = False
        self.cancel_calls = 0
        self.cancelled_at: float | None = None
        self._error = error
        self._result: str | ServiceError | None = None
        self._changed = asyncio.Condition()
        self._task = asyncio.create_task(self._run(queue))

    @property
    def complete(self) -> bool:
        return isinstance(self._result, str)

    @property
    def failed(self) -> bool:
        return isinstance(self._result, ServiceError)

    async def wait(self) -> None:
        await asyncio.wait([self._task])

    def cancel(self) -> None:
        self.cancel_calls += 1
        self._task.cancel()

    async def deltas(self) -> AsyncIterator[str]:
        read = 0
        while True:
            if read < len(self.words):
                read += 1
                yield self.words[read - 1]
            elif isinstance(self._result, ServiceError):
                raise self._result
            elif self._result is not None:
                return
            else:
                async with self._changed:
                    await self._changed.wait()

    async def _run(self, queue: RequestQueue) -> None:
        try:
            async with queue.slot(queue.enter("a", None), None):
                for word in WORDS:
                    await asyncio.sleep(1)
                    self.words.append(word)
                    await self._notify()
            if self._error is not None:
                raise self._error
            self._result = "".join(self.words)
        except ServiceError as error:
            self._result = error
        except asyncio.CancelledError:
            self._result = InternalError()
            self.cancelled_at = now()
            raise
        finally:
            await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class SharingService:
    """Uses a coalescer like the servicer, without gRPC. Storing a reply takes 0.1 s, after `before_store`."""

    def __init__(self, before_store: Callable[[], None] = lambda: None) -> None:
        self.queue = RequestQueue(1, max_queue_size=10, queue_timeout_seconds=1000)
        self.generations: list[ScriptedGeneration] = []
        self.stored: dict[str, str] = {}
        self.error: ServiceError | None = None
        self.coalescer: Coalescer[str, ScriptedGeneration] = Coalescer(self._store)
        self._before_store = before_store

    async def call(self, key: str | None = "key", deadline: float | None = None) -> list[tuple[float, str]]:
        """Make a call that is cancelled at its deadline; return each delta with its time since the call's start."""
        started_at = now()
        async with asyncio.timeout_at(deadline):
            with self.coalescer.subscribe(key, self.start) as subscription:
                return [(now() - started_at, delta) async for delta in subscription.generation.deltas()]

    def start(self) -> ScriptedGeneration:
        generation = ScriptedGeneration(self.queue, self.error)
        self.generations.append(generation)
        return generation

    async def _store(self, key: str, generation: ScriptedGeneration) -> None:
        self._before_store()
        await asyncio.sleep(0.1)
        self.stored[key] = "".join(generation.words)


def now() -> float:
    return asyncio.get_running_loop().time()


def words(reply: list[tuple[float, str]]) -> list[str]:
    return [word for _, word in reply]
