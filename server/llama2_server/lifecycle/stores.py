"""Open the stores that outlive a request: the usage ledger, the quotas and the response cache."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NoReturn

from llama2_server.admission.quota import Quota
from llama2_server.api.health import QUOTA_STORE, USAGE_STORE, HealthServicer
from llama2_server.card import ModelCard
from llama2_server.config.settings import Settings
from llama2_server.configuration_error import ConfigurationError
from llama2_server.generation.response_cache import MemoryResponseCache, RedisResponseCache, ResponseCache
from llama2_server.lifecycle.preflight import StartupInputs
from llama2_server.lifecycle.tasks import background_task
from llama2_server.usage.ledger import Ledger

logger = logging.getLogger(__name__)

PROBE_SECONDS = 1.0
KEY_PURGE_SECONDS = 60.0


@asynccontextmanager
async def open_ledger(settings: Settings, inputs: StartupInputs) -> AsyncIterator[Ledger]:
    """Open the usage ledger in the data directory, which forwards to the usage store, and close it after the body.

    Raises:
        ConfigurationError: the ledger cannot be opened with this configuration.
    """
    ledger = await Ledger.open(
        data_directory=settings.data_directory,
        neuron_costs=inputs.card.neuron_costs,
        store=inputs.usage_store,
        max_pending_records=settings.usage_max_pending_records,
        budget_of=lambda account_id: inputs.authenticator.limits(account_id).neurons_per_month,
        keys_fall_back=settings.idempotency_fallback == "local",
    )
    try:
        yield ledger
    finally:
        await ledger.close()


@asynccontextmanager
async def open_quota(settings: Settings, inputs: StartupInputs) -> AsyncIterator[Quota]:
    """Open the quotas, in memory or in Redis, and close them after the body.

    Raises:
        ConfigurationError: the Redis URL cannot be used.
    """
    try:
        quota = Quota(
            inputs.card.constellation_config.max_requests_per_min,
            redis_url=settings.redis_url.get_secret_value() if settings.redis_url else None,
            fallback=settings.quota_fallback,
            model=inputs.card.name,
            limits_of=inputs.authenticator.limits,
        )
    except (ValueError, ImportError) as error:
        raise ConfigurationError(f"--redis-url: {error}") from error
    try:
        yield quota
    finally:
        await quota.close()


@asynccontextmanager
async def watch_stores(quota: Quota, ledger: Ledger, health: HealthServicer) -> AsyncIterator[None]:
    """Probe the stores and the local disk each second during the body, and report them to the health service.

    Expired idempotency keys are deleted each minute.
    """
    async with (
        background_task(_watch(quota.probe_store, lambda: health.set_store(QUOTA_STORE, quota.store_up))),
        background_task(_watch(ledger.probe_store, lambda: health.set_store(USAGE_STORE, ledger.store_up))),
        background_task(_purge_keys(ledger)),
        background_task(_watch(ledger.probe_disk, lambda: health.set_disk_writable(ledger.disk_writable))),
    ):
        yield


async def _watch(probe: Callable[[], Awaitable[None]], report: Callable[[], None]) -> NoReturn:
    while True:
        try:
            await probe()
        except Exception:  # the next probe may succeed
            logger.exception("a probe of a store failed")
        report()
        await asyncio.sleep(PROBE_SECONDS)


async def _purge_keys(ledger: Ledger) -> NoReturn:
    while True:
        await ledger.keys.purge()
        await asyncio.sleep(KEY_PURGE_SECONDS)


@asynccontextmanager
async def open_response_cache(settings: Settings, card: ModelCard) -> AsyncIterator[ResponseCache | None]:
    """Open the response cache if the card has one, in memory or in Redis, and close it after the body."""
    if card.constellation_config.infer_response_cache is None:
        yield None
        return
    ttl_seconds = settings.response_cache_ttl_seconds
    cache: ResponseCache
    if settings.redis_url is None:
        cache = MemoryResponseCache(max_bytes=settings.response_cache_max_bytes, ttl_seconds=ttl_seconds)
    else:
        url = settings.redis_url.get_secret_value()
        cache = RedisResponseCache(
            url, ttl_seconds=ttl_seconds, max_entry_bytes=settings.response_cache_max_entry_bytes
        )
    try:
        yield cache
    finally:
        await cache.close()
