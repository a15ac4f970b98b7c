"""The replies that replicas share: one replica computes a reply, and the others read it through Redis.

A generation claims the lease of its request when it has a slot. If another replica has the lease, the generation frees
the slot and follows that replica. Without a renewal for the time of a lease, it computes the reply itself.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any, Literal, Protocol, get_args

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llama2_server.config.settings import Settings
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.errors import EngineUnavailable
from llama2_server.generation.replicas import leases as lease_times
from llama2_server.generation.replicas.leases import RENEW_SECONDS, ReplyEnd, ReplyLeases
from llama2_server.generation.response_cache import CacheEntry
from llama2_server.redis_client import RedisUnavailable

POLL_SECONDS = 0.05

Result = Literal["computed", "joined", "recomputed", "failed", "unshared"]


class LocalReply(Protocol):
    """A generation of this replica."""

    changed: asyncio.Event
    """Set at the next change of the text or the state."""

    @property
    def text(self) -> str:
        """The text so far."""

    @property
    def end(self) -> ReplyEnd | None:
        """The end of a complete reply."""

    @property
    def failed(self) -> bool:
        """Whether it was rejected, failed or was cancelled."""

    def add_text(self, text: str) -> None:
        """Add text; text that repeats the known text is skipped."""

    def repeat_text(self) -> None:
        """Expect the text from its start again."""

    def notify(self) -> None:
        """Set `changed`."""

    def stop(self) -> None:
        """End it without a reply."""


class SharedReply:
    """A generation's share in the lease of its request; it follows, claims and publishes in this order."""

    def __init__(
        self,
        leases: ReplyLeases,
        digest: str,
        seed: int,
        fingerprint: Fingerprint,
        stored: Callable[[], Awaitable[CacheEntry | None]],
        count: Callable[[Result], None],
        run: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._leases = leases
        self._digest = digest
        self._seed = seed
        self._fingerprint = fingerprint
        self._stored = stored
        self._count = count
        self._run = run
        self._name = secrets.token_hex(8)
        self._leaving = False
        self._alone = False  # the lease has another seed
        self._followed_fingerprint = ""  # of the replica that it followed last
        self.joined = False
        """Whether it has followed another replica; it then costs nothing."""
        self.owned = False
        """Whether other replicas can read it."""
        self.remote_readers = 0
        """The number of replicas that read it; at most half a second old."""

    async def claim(self, reply: LocalReply) -> bool:
        """Take the lease and publish the reply; return False if another replica has the lease.

        Without Redis, return True: the reply is then not shared.
        """
        if self._alone:
            return True
        try:
            self.owned = await self._leases.claim(self._digest, self._name, self._seed, self._fingerprint.value)
        except RedisUnavailable:
            return True
        except asyncio.CancelledError:  # Redis may have given the lease
            self._run(self._publish(reply))
            raise
        if self.owned:
            self._run(self._publish(reply))
        return self.owned

    async def cached(self, reply: LocalReply) -> ReplyEnd | None:
        """Take the reply that another replica has stored in the meantime, if it has one; return its end."""
        entry = await self._stored() if self.owned else None
        if entry is None or entry.seed != self._seed:
            self._count("recomputed" if self.joined else "computed" if self.owned else "unshared")
            return None
        self._count("joined")
        self.joined = True
        reply.repeat_text()
        reply.add_text(entry.text)
        return ReplyEnd(entry.finish_reason, entry.input_tokens, entry.output_tokens)

    async def follow(self, reply: LocalReply) -> ReplyEnd | None:
        """Read the reply from the replica that computes it; None if this replica must compute it.

        Raises:
            EngineUnavailable: the text cannot be continued, because the fingerprints differ.
        """
        owner, position, read_at = "", "0", _now()
        try:
            while _now() - read_at < lease_times.LEASE_SECONDS:
                with suppress(RedisUnavailable):
                    part = await self._leases.read(self._digest, self._name, owner, position)
                    if part is None:
                        break
                    if part.seed != self._seed:
                        self._alone = True
                        break
                    read_at, position = _now(), part.position
                    if part.owner != owner:
                        owner = part.owner
                        self._join(reply, part.fingerprint)
                    reply.add_text(part.text)
                    if part.end is not None or reply.failed:
                        return part.end
                await asyncio.sleep(POLL_SECONDS)
            self._check_continuable(reply, self._fingerprint.value)
            reply.repeat_text()
            return None
        finally:
            with suppress(RedisUnavailable):
                await self._leases.leave(self._digest, self._name)

    def leave(self, reply: LocalReply) -> None:
        """End a reply without readers on this replica, unless other replicas read it."""
        if not self.owned:
            reply.stop()
        self._leaving = True
        reply.notify()

    def _join(self, reply: LocalReply, fingerprint: str) -> None:
        if self.joined:
            self._check_continuable(reply, fingerprint)
        else:
            self._count("joined")
        self.joined, self._followed_fingerprint = True, fingerprint
        reply.repeat_text()

    def _check_continuable(self, reply: LocalReply, fingerprint: str | None) -> None:
        if reply.text and not (fingerprint and fingerprint == self._followed_fingerprint):
            self._count("failed")
            raise EngineUnavailable(
                "the server that computed the reply has stopped, and another one would continue it with another "
                "fingerprint; retry"
            )

    async def _publish(self, reply: LocalReply) -> None:
        """Let other replicas read the reply until it ends."""
        published, renewed_at = 0, _now()
        try:
            while published >= 0 and _now() - renewed_at < lease_times.LEASE_SECONDS:
                changed, text, end = reply.changed, reply.text, reply.end
                leaves = "always" if reply.failed else "unread" if self._leaving and end is None else ""
                try:
                    published, self.remote_readers = await self._leases.publish(
                        self._digest, self._name, published, text[published:], end, leaves
                    )
                    renewed_at = _now()
                except RedisUnavailable:
                    if leaves:
                        break
                    await asyncio.sleep(POLL_SECONDS)
                    continue
                if end is not None and published == len(text):
                    break
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS if self._leaving else RENEW_SECONDS):
                        await changed.wait()
        finally:
            self.owned, self.remote_readers = False, 0
            if self._leaving:
                reply.stop()


class SharedReplies(Collector):
    """The replies that this replica shares, and their metrics.

    Args:
        leases: the leases of all replicas; None shares nothing.
        fingerprint: names what decides a text; without a value, another replica cannot continue a text.
    """

    def __init__(self, leases: ReplyLeases | None, fingerprint: Fingerprint) -> None:
        self._leases = leases
        self._fingerprint = fingerprint
        self._results: dict[Result, int] = dict.fromkeys(get_args(Result), 0)
        self._publishing: dict[asyncio.Task[None], None] = {}

    @classmethod
    def of(cls, settings: Settings, fingerprint: Fingerprint) -> "SharedReplies":
        """Return the shared replies of the settings."""
        if settings.redis_url is None or not settings.coalesce_across_replicas:
            return cls(None, fingerprint)
        seed_seconds = settings.queue_timeout_seconds + lease_times.LEASE_SECONDS
        return cls(ReplyLeases(settings.redis_url.get_secret_value(), seed_seconds=seed_seconds), fingerprint)

    async def find(self, digest: str, seed: int) -> tuple[int, bool]:
        """Return the seed of equal requests, at first the given one, and whether a replica computes the reply."""
        with suppress(RedisUnavailable):
            if self._leases is not None:
                return await self._leases.find(digest, seed)
        return seed, False

    def reply(self, digest: str, seed: int, stored: Callable[[], Awaitable[CacheEntry | None]]) -> SharedReply | None:
        """Return the share of a new generation; None if nothing is shared.

        `stored` returns the reply from the response cache.
        """
        if self._leases is None:
            return None
        return SharedReply(self._leases, digest, seed, self._fingerprint, stored, self._count, self._publish)

    async def close(self) -> None:
        """Wait until the ends of all replies are published; call it after the last generation."""
        await asyncio.gather(*self._publishing)
        if self._leases is not None:
            await self._leases.close()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics, on the scrape thread."""
        metric = CounterMetricFamily(
            "llama2_shared_generations",
            "Generations with coalescing across replicas: computed for all replicas, joined on another one, recomputed "
            "or failed after the other one was lost, or unshared without Redis.",
            labels=("result",),
        )
        for result, count in self._results.items():
            metric.add_metric((result,), count)
        yield metric

    def _count(self, result: Result) -> None:
        self._results[result] += 1

    def _publish(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._publishing[task] = None
        task.add_done_callback(self._publishing.pop)


def _now() -> float:
    return asyncio.get_running_loop().time()
