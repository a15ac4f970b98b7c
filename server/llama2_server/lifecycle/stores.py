"""What outlives a request: the usage ledger, the quotas and the response cache."""

from contextlib import AsyncExitStack
from dataclasses import dataclass

from llama2_server.admission.quota import Quota
from llama2_server.card import ModelCard
from llama2_server.config.settings import Settings
from llama2_server.configuration_error import ConfigurationError
from llama2_server.generation.response_cache import MemoryResponseCache, RedisResponseCache, ResponseCache
from llama2_server.usage.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Stores:
    """All of them, open."""

    ledger: Ledger
    quota: Quota
    cache: ResponseCache | None


async def open_stores(settings: Settings, card: ModelCard, stack: AsyncExitStack) -> Stores:
    """Open the stores; the stack closes them, once nothing uses them any more.

    Raises:
        LedgerError: the ledger cannot be opened as it is configured.
        ConfigurationError: neither can Redis.
    """
    ledger = await Ledger.open(
        data_directory=settings.data_directory,
        neuron_costs=card.neuron_costs,
        url=settings.usage_url.get_secret_value() if settings.usage_url else None,
        journal_limit_bytes=settings.usage_journal_max_bytes,
    )
    stack.push_async_callback(ledger.close)
    quota = _quota(settings, card)
    stack.push_async_callback(quota.close)
    cache = _cache(settings, card)
    if cache is not None:
        stack.push_async_callback(cache.close)
    return Stores(ledger, quota, cache)


def _quota(settings: Settings, card: ModelCard) -> Quota:
    try:
        return Quota(
            card.constellation_config.max_requests_per_min,
            redis_url=settings.redis_url.get_secret_value() if settings.redis_url else None,
            fallback=settings.quota_fallback,
            model=card.name,
        )
    except (ValueError, ImportError) as error:
        raise ConfigurationError(f"redis_url: {error}") from error


def _cache(settings: Settings, card: ModelCard) -> ResponseCache | None:
    """The response cache that the card asks for, if it does; in Redis where there is one to share."""
    if card.constellation_config.infer_response_cache is None:
        return None
    ttl_seconds = settings.response_cache_ttl_seconds
    if settings.redis_url is None:
        return MemoryResponseCache(max_bytes=settings.response_cache_max_bytes, ttl_seconds=ttl_seconds)
    url = settings.redis_url.get_secret_value()
    return RedisResponseCache(url, ttl_seconds=ttl_seconds, max_entry_bytes=settings.response_cache_max_entry_bytes)
