"""Redis and PostgreSQL that hang (SIGSTOP) or die (SIGKILL) while clients call."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Iterable
from contextlib import AsyncExitStack

from tests.integration.usage.conftest import stored
from tests.reliability.chaos.history import Tokens, broken_totals, read_records
from tests.reliability.chaos.kills import SLOTS, fast_card
from tests.reliability.chaos.scene import NOT_SERVING, SERVING, Scene
from tests.reliability.chaos.traffic import Traffic, traffic
from tests.support.processes import card_file
from tests.support.servers.postgres_server import running_postgres
from tests.support.servers.redis_server import running_redis

QUOTA = 60
"""Requests per minute of the scene with Redis, for both servers together."""
NO_QUOTA, NO_REDIS = "RESOURCE_EXHAUSTED QUOTA_EXCEEDED", "UNAVAILABLE QUOTA_STORE_UNAVAILABLE"


async def play_redis(scene: Scene) -> None:
    """SIGSTOP and SIGKILL of Redis: calls are rejected at once, and two servers together keep the quota."""
    with running_redis(scene.folder) as redis:
        quota = {"default": QUOTA, "accounts": {}}
        card = card_file(
            scene.folder, max_concurrent_requests=SLOTS, infer_response_cache=None, max_requests_per_min=quota
        )
        folders = [scene.folder / name for name in ("a", "b")]
        flags = ("--card", str(card), "--weights", "demo", "--redis-url", redis.url)
        servers = [await scene.start(folder, *flags) for folder in folders]
        async with AsyncExitStack() as stack:
            running = [
                await stack.enter_async_context(traffic(server.address, scene.draw, clients=2)) for server in servers
            ]
            started_at = time.monotonic()
            await _until_all(one.completed(scene.draw.randrange(3, 10)) for one in running)
            redis.freeze()
            await _check_outage(scene, running)
            redis.thaw()
            await _until_quota_is_used(scene, running, started_at)
            redis.kill()  # with its counts
            await _check_outage(scene, running)
            redis.start()
            counted = sum(len(one.history.completed) for one in running)
            await _until_quota_is_used(scene, running, time.monotonic(), counted)
        for server, folder, one in zip(servers, folders, running, strict=True):
            await scene.stop(server)
            scene.check_records(folder, one.history)
            scene.check_statuses(one.history, NO_QUOTA, NO_REDIS)
        replies = sum(len(one.history.completed) for one in running)
        rejected = sum(one.history.failures[NO_REDIS] for one in running)
        scene.figures.append(f"{replies} replies, {rejected} calls rejected without Redis")


async def _check_outage(scene: Scene, running: list[Traffic]) -> None:
    """Wait until calls are rejected because of Redis; only its own health name changes."""
    await _until_all(one.failed(NO_REDIS, 5) for one in running)
    for one in running:
        await scene.health(one.channel, NOT_SERVING, "quota-store")
        await scene.health(one.channel, SERVING)


async def _until_quota_is_used(scene: Scene, running: list[Traffic], started_at: float, counted: int = 0) -> None:
    """Wait until Redis is back and the quota is used up; more calls than the quota must not be served."""
    for one in running:
        await scene.health(one.channel, SERVING, "quota-store")
    await _until_all(one.failed(NO_QUOTA, 5) for one in running)
    served = sum(len(one.history.completed) for one in running) - counted
    windows = 1 + int((time.monotonic() - started_at) / 60)
    # Calls that were served when Redis lost its counts were counted before.
    limit = QUOTA * windows + (2 * len(running) if counted else 0)
    scene.check(served <= limit, f"{served} calls were served in {windows} minutes, the quota allows {limit}")


async def _until_all(waits: Iterable[Awaitable[None]]) -> None:
    await asyncio.gather(*waits)


async def play_postgresql(scene: Scene) -> None:
    """SIGSTOP and SIGKILL of PostgreSQL, and SIGKILL of the server: calls are served, and each record arrives once."""
    with running_postgres() as cluster:
        url, data = cluster.new_database(), scene.folder / "data"
        flags = ("--card", str(fast_card(scene.folder)), "--weights", "demo", "--usage-url", url)
        server = await scene.start(data, *flags)
        async with traffic(server.address, scene.draw) as before:
            await before.completed(scene.draw.randrange(10, 30))
            cluster.signal(signal.SIGSTOP)
            await scene.health(before.channel, NOT_SERVING, "usage-store")
            await scene.health(before.channel, SERVING)
            await before.completed(20)
            server.kill()
            await asyncio.to_thread(server.wait)
        # It starts while PostgreSQL hangs.
        server = await scene.start(data, *flags)
        async with traffic(server.address, scene.draw) as after:
            await after.completed(scene.draw.randrange(10, 30))
            cluster.signal(signal.SIGCONT)
            await scene.health(after.channel, SERVING, "usage-store")
            await after.completed(10)
            cluster.kill()
            await scene.health(after.channel, NOT_SERVING, "usage-store")
            await after.completed(20)
            await asyncio.to_thread(cluster.start)
            await scene.health(after.channel, SERVING, "usage-store")
            await after.completed(10)
        await scene.stop(server)
        records = {
            record.request_id: Tokens(record.outcome, record.input_tokens, record.output_tokens, record.neurons)
            for record in await stored(url)
        }
        for one in (before, after):
            scene.broken.extend(one.history.broken_promises(records))
        scene.broken.extend(broken_totals(data))
        scene.check(not read_records(data), "records are not forwarded, although PostgreSQL answers")
        scene.check_statuses(before.history, "UNAVAILABLE")  # the connection of the killed server
        scene.check_statuses(after.history)
        scene.figures.append(f"{len(records)} records in PostgreSQL, {len(after.history.completed)} replies at the end")
