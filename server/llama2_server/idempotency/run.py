"""The reply of one key on this server, from its claim until no client can resume it from memory.

It runs in a dedicated task, so that it continues when the connection of a client breaks. A generation without readers
continues for a while, but only as long as no other call waits for its slot and the server does not drain.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from llama2_server.admission.request_queue import RequestQueue
from llama2_server.errors import InternalError, ServiceError, ShuttingDown
from llama2_server.generation.coalescing import Subscription
from llama2_server.generation.generation import Generation
from llama2_server.generation.reply import GeneratedReply, Reply, ReplyStats
from llama2_server.idempotency.key_accounting import KeyAccounting
from llama2_server.idempotency.request import KeyedRequest, beyond_the_text
from llama2_server.telemetry.call import Call
from llama2_server.usage.keys.records import KeyRecord

logger = logging.getLogger(__name__)


class KeyRun:
    """One run; `start` it, and read it in `reading`.

    Args:
        call: the call that started it.
        request: the request of that call.
        queue: the queue of the server's slots.
        window_seconds: how long it continues without a reader, and how long a complete reply stays in memory.
    """

    def __init__(self, call: Call, request: KeyedRequest, queue: RequestQueue, window_seconds: float) -> None:
        self.call = call
        self.request = request
        self.record: KeyRecord | None = None
        """The key's record, after the request was found to be the key's."""
        self.error: ServiceError | None = None
        self.completion: bytes | None = None
        """The completion without timings, after the usage record is durable."""
        self.stopping = False
        """Whether it ends without a reply; a new call of the key must wait for its end."""
        self._is_wanted = False
        self._queue = queue
        self._window_seconds = window_seconds
        self._accounting: KeyAccounting | None = None
        self._reply: Reply | None = None
        self._readers = 0
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, serve: Callable[["KeyRun"], Awaitable[None]], on_end: Callable[["KeyRun"], None]) -> None:
        """Start the task, which calls `serve`, keeps the reply for the window, and calls `on_end`."""
        self._task = asyncio.create_task(self._run(serve, on_end))

    @contextmanager
    def reading(self, call: Call) -> Iterator[None]:
        """Count a reader for the body. After the last one, the run continues for the window, or stops."""
        self._readers += 1
        self._set_read()
        try:
            yield
        finally:
            self._readers -= 1
            if not self._readers:
                self._set_unread()

    async def wait(self) -> None:
        """Wait until the run has ended, with its usage record written."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def bound(self) -> KeyRecord | None:
        """Return the key's record; None if the call that started the run did not get the key."""
        while self.record is None and self.error is None:
            await self._changed.wait()
        return self.record

    async def admitted(self) -> Reply:
        """Return the reply after its usage record is open; raises the ServiceError of a rejection."""
        while self._reply is None:
            if self.error is not None:
                raise self.error
            await self._changed.wait()
        return self._reply

    async def completed(self) -> bytes:
        """Return the completion after the usage record is durable; raises the ServiceError of a failure."""
        while self.completion is None:
            if self.error is not None:
                raise self.error
            await self._changed.wait()
        return self.completion

    def bind(self, record: KeyRecord, accounting: KeyAccounting) -> None:
        """Set the key's record: the request of this run is the key's."""
        self.record, self._accounting = record, accounting
        self._notify()

    async def deliver(self, reply: Reply, accounting: KeyAccounting) -> None:
        """Let the readers read an admitted reply. After its end, write its usage record once it has a reader."""
        self._reply = reply
        self._notify()
        if not self._readers:
            self._set_unread()
        with self._watching_other_readers():
            if (generation := self._generation) is not None:
                await generation.wait()
            async for _ in reply.deltas():  # raises the error of a generation that failed
                pass
            while not self._readers:  # computed without a reader, the rest is billed only if one returns
                await self._changed.wait()
        key = accounting.settle()
        stats = replace(reply.stats(), cached=key.cached)
        completion = key.completion or self.request.describe(key.request_id, stats, accounting.is_local)
        await accounting.finish(self.call, stats.finish_reason.name, completion)
        self.complete(reply, completion)

    def complete(self, reply: Reply, completion: bytes) -> None:
        """Set a complete reply whose usage record is durable."""
        self._reply, self.completion = reply, completion
        self._notify()

    def stats(self, started_at: float) -> ReplyStats:
        """Return the statistics of a complete reply for a call that started at this time."""
        if (subscription := self._subscription) is not None:
            return GeneratedReply(subscription.generation, shared=False, started_at=started_at).stats()
        if self._reply is None:
            raise RuntimeError("the reply is not complete")
        return self._reply.stats()

    def add_fingerprint(self) -> None:
        """Store the fingerprint of this server with the key, if the weights were not hashed before."""
        if self._accounting is not None:
            self._accounting.add_fingerprint()

    def free_slot(self) -> None:
        """Stop, if the generation holds or waits for a slot without a reader."""
        generation = self._generation
        if generation is not None and generation.unread and not generation.complete:
            self.stop()

    def hand_over(self) -> None:
        """Stop once the last reader has left, because a call of the key waits on another server."""
        self._is_wanted = True
        has_readers = self._readers or self._is_read_by_others
        if self._reply is not None and self.completion is None and not has_readers:
            self.stop()

    def stop(self) -> None:
        """End the run; its generation leaves the queue, or stops within one step."""
        self.stopping = True
        if (generation := self._generation) is not None and generation.failed:
            return  # its error ends the run: a rejection gives the quota back, and a cancellation would not
        if self._accounting is not None:
            self._accounting.server_drains = self._queue.closed
        if self._task is not None:
            self._task.cancel()

    @property
    def _subscription(self) -> Subscription[Generation] | None:
        source = None if self._accounting is None else self._accounting.source
        return source if isinstance(source, Subscription) else None

    @property
    def _generation(self) -> Generation | None:
        return None if self._subscription is None else self._subscription.generation

    async def _run(self, serve: Callable[["KeyRun"], Awaitable[None]], on_end: Callable[["KeyRun"], None]) -> None:
        try:
            await serve(self)
            while self._readers or self._timer is not None:
                await self._changed.wait()
        except ServiceError as error:
            self.error = error
        except asyncio.CancelledError:
            self.error = ShuttingDown("the server is shutting down; retry")
        except Exception:  # otherwise readers would wait forever
            logger.exception("a reply with an idempotency key failed")
            self.error = InternalError()
        finally:
            self.stopping = True
            self._cancel_timer()
            on_end(self)
            self._notify()

    def _set_read(self) -> None:
        self._cancel_timer()
        if self._accounting is not None:
            self._accounting.read_tokens = None
        if (generation := self._generation) is not None:
            generation.unread = False
        self._notify()

    def _set_unread(self) -> None:
        """Continue without a reader for the window, unless the generation would hold back other calls."""
        # Before its admission, a call goes on, so that its quota is consumed for a key that keeps it.
        if self.stopping or self._reply is None:
            return
        if self.completion is None and self._is_read_by_others:
            return  # the window starts when they have left, too
        self._timer = asyncio.get_running_loop().call_later(self._window_seconds, self._end_window)
        generation, accounting = self._generation, self._accounting
        if generation is None or accounting is None or self.completion is not None:
            return
        accounting.read_tokens, accounting.left_in_drain = generation.computed_tokens, self._queue.closed
        generation.unread = True
        if self._is_wanted:
            self.stop()
        elif not generation.admitted_at or self._queue.waiting or self._queue.closed:
            self.free_slot()

    def _end_window(self) -> None:
        self._timer = None
        if self.completion is not None:
            self._notify()
        else:
            self.stop()

    @contextmanager
    def _watching_other_readers(self) -> Iterator[None]:
        """For the body, start the window when the last request that shares the generation leaves it unread."""
        subscription = self._subscription
        if subscription is None:
            yield
            return
        callbacks = (subscription.readers.on_leave, subscription.generation.on_remote_readers)
        for calls in callbacks:
            calls.append(self._on_other_readers)
        try:
            yield
        finally:
            for calls in callbacks:
                calls.remove(self._on_other_readers)

    def _on_other_readers(self) -> None:
        if self._readers:
            return
        if self._is_read_by_others:
            self._set_read()  # a reader on another replica may have come a moment after the last one here left
        elif self._timer is None:
            self._set_unread()

    @property
    def _is_read_by_others(self) -> bool:
        """Whether other requests share the generation: then it continues, and the call that started it pays for it."""
        subscription = self._subscription
        return subscription is not None and (subscription.readers.now > 1 or subscription.generation.read_elsewhere)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class KeyedReply:
    """The reply of a key as one call sees it: the text after the characters that its client has."""

    def __init__(self, run: KeyRun, reply: Reply, call: Call, resume_after: int) -> None:
        self._run = run
        self._reply = reply
        self._call = call
        self._resume_after = resume_after

    async def deltas(self) -> AsyncIterator[str]:
        """Yield the rest of the text, then wait for the record."""
        skipped = 0
        async for delta in self._reply.deltas():
            rest = delta[self._resume_after - skipped :] if skipped < self._resume_after else delta
            skipped += len(delta) - len(rest)
            if rest:
                yield rest
        if skipped < self._resume_after:
            raise beyond_the_text(skipped)
        await self._run.completed()

    def stats(self) -> ReplyStats:
        """Return the statistics of this call; only after `deltas` has ended."""
        return self._run.stats(self._call.started_at)

    @property
    def completion(self) -> bytes:
        """The completion of all calls of the key, without timings; only after `deltas` has ended."""
        if self._run.completion is None:
            raise RuntimeError("the reply is not complete")
        return self._run.completion
