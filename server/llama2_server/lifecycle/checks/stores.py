"""Whether Redis and the usage database answer at startup.

A store that answers and rejects the server is an error of the configuration. A store that does not answer may return:
it is an error only with `--require-stores`; otherwise its watcher logs one warning (lifecycle/stores.py).
"""

import asyncio
from contextlib import suppress

from llama2_server.config.settings import Settings
from llama2_server.configuration_error import ConfigurationError
from llama2_server.redis_client import RedisClient
from llama2_server.usage.errors import StoreUnavailable
from llama2_server.usage.store import Store

TIMEOUT_SECONDS = 1.5  # a start that cannot succeed ends within three seconds, imports included
REQUIRED = "start it, correct the address, or pass --no-require-stores to start without it"


def check_stores(settings: Settings) -> None:
    """Connect to the stores that the settings name, both at the same time, and disconnect.

    Raises:
        ConfigurationError: a URL is not valid, a store rejects the connection, or with `require_stores` a store does
            not answer within TIMEOUT_SECONDS. One line per store.
    """
    if settings.redis_url is not None or settings.usage_url is not None:
        errors = asyncio.run(_errors(settings))
        if errors:
            raise ConfigurationError("\n".join(errors))


async def _errors(settings: Settings) -> list[str]:
    errors = []
    checks = (_check_redis(settings), _check_usage_store(settings))
    for result in await asyncio.gather(*checks, return_exceptions=True):
        if isinstance(result, ConfigurationError):
            errors.append(str(result))
        elif result is not None:
            raise result
    return errors


async def _check_redis(settings: Settings) -> None:
    if settings.redis_url is None:
        return
    try:
        redis = RedisClient(settings.redis_url.get_secret_value(), subject="store", timeout_seconds=TIMEOUT_SECONDS)
    except (ValueError, ImportError) as error:
        raise ConfigurationError(f"--redis-url: {error}") from error
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            rejection = await redis.rejection()
    except (OSError, TimeoutError) as error:
        rejection = None
        if settings.require_stores:
            raise ConfigurationError(f"--redis-url: {redis.address} does not answer; {REQUIRED}") from error
    finally:
        with suppress(OSError):
            await redis.close()
    if rejection is not None:
        raise ConfigurationError(
            f"--redis-url: {redis.address} rejects the connection ({rejection}); correct the user, the password or the "
            "database in the URL"
        )


async def _check_usage_store(settings: Settings) -> None:
    if settings.usage_url is None:
        return
    store = Store(settings.usage_url.get_secret_value())
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await store.connect()
    except StoreUnavailable as error:
        if not error.temporary:
            raise ConfigurationError(
                f"--usage-url: the usage database rejects the connection ({error}); correct the URL, or create the "
                "database and its user"
            ) from error
        if settings.require_stores:
            raise ConfigurationError(f"--usage-url: the usage database does not answer; {REQUIRED}") from error
    except TimeoutError as error:
        if settings.require_stores:
            raise ConfigurationError(f"--usage-url: the usage database does not answer; {REQUIRED}") from error
    finally:
        await store.close()
