"""The replies that replicas share: one replica computes a reply, and the others read it through Redis.

A generation claims the lease of its request when it has a slot. If another replica has the lease, the generation frees
the slot and follows that replica. Without a renewal for the time of a lease, it computes the reply itself.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any, get_args

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llama2_server.config.settings import Settings
from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.generation.replicas.leases import LEASE_SECONDS, ReplyLeases
from llama2_server.generation.replicas.shared_reply import Result, SharedReply, Sharing
from llama2_server.generation.response_cache import CacheEntry, CacheKey
from llama2_server.redis_client import RedisUnavailable


class SharedReplies(Collector):
    """The replies that this replica shares, and their metrics.

    Args:
        leases: the leases of all replicas; None shares nothing.
        fingerprint: the inputs that decide a text; without a value, another replica cannot continue a text.
    """

    def __init__(self, leases: ReplyLeases | None, fingerprint: Fingerprint) -> None:
        self._leases = leases
        self._sharing = None if leases is None else Sharing(leases, fingerprint, self._count, self._start)
        self._results: dict[Result, int] = dict.fromkeys(get_args(Result), 0)
        self._tasks: dict[asyncio.Task[None], None] = {}

    @classmethod
    def of(cls, settings: Settings, fingerprint: Fingerprint) -> "SharedReplies":
        """Return the shared replies of the settings."""
        if settings.redis_url is None or not settings.coalesce_across_replicas:
            return cls(None, fingerprint)
        seed_seconds = settings.queue_timeout_seconds + LEASE_SECONDS
        return cls(ReplyLeases(settings.redis_url.get_secret_value(), seed_seconds=seed_seconds), fingerprint)

    async def find(self, key: CacheKey, seed: int) -> tuple[int, bool]:
        """Return the seed of equal requests, at first the given one, and whether a replica computes the reply."""
        if self._leases is not None:
            with suppress(RedisUnavailable):
                agreed, computed = await self._leases.find(key.digest, seed)
                # A request's own seed is part of its digest.
                if not key.seeded or agreed == seed:
                    return agreed, computed
        return seed, False

    def reply(
        self, key: CacheKey, seed: int, stored: Callable[[CacheKey], Awaitable[CacheEntry | None]]
    ) -> SharedReply | None:
        """Return the share of a new generation; None if nothing is shared.

        `stored` returns the reply from the response cache.
        """
        if self._sharing is None:
            return None
        return SharedReply(self._sharing, key.digest, seed, lambda: stored(key))

    async def close(self) -> None:
        """Wait until the ends of all replies are published; call it after the last generation."""
        await asyncio.gather(*self._tasks)
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

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
