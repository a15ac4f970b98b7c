"""One Redis, asked with a time limit, and left alone for a moment after it did not answer."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

# A store that swallows packets shall not cost every call the time-out.
BACKOFF_SECONDS = 1.0
CONNECTIONS = 16

Answer = TypeVar("Answer")


class RedisUnavailable(Exception):
    """Redis does not answer, or not with an answer."""


class RedisClient:
    """Connects at the first question, and again by itself.

    Args:
        url: redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], or rediss://...; the password is never said.
        subject: what is kept there, for the log.
        timeout_seconds: an answer that takes longer is none.

    Raises:
        ValueError: this is no Redis URL.
        ImportError: the `redis` extra is not installed.
    """

    def __init__(self, url: str, *, subject: str, timeout_seconds: float) -> None:
        try:
            import redis.asyncio  # an extra that most servers run without
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import RedisError
        except ImportError as error:
            raise ImportError("a Redis URL needs the redis extra: pip install 'llama2-grpc[redis]'") from error
        try:
            pool = redis.asyncio.BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=timeout_seconds,
                # One try only: what was sent twice could count twice.
                retry=Retry(NoBackoff(), 0),
                # With protocol 3 redis-py does not notice that a pooled connection has gone.
                protocol=2,
            )
        except ValueError:
            # The library's message may quote a part of the password.
            raise ValueError(
                "the Redis URL must be redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], or rediss://..."
            ) from None
        self.client: Any = redis.asyncio.Redis(connection_pool=pool)
        self.up = True
        """Whether Redis answered when it was last asked."""
        self._failures = (RedisError, OSError, TimeoutError)
        self._subject = f"{subject} at {urlsplit(url).netloc.rpartition('@')[2]}"
        self.timeout_seconds = timeout_seconds
        self._rests_until = -math.inf

    async def ask(self, question: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer to a question that uses `client`.

        Raises:
            RedisUnavailable: there is none, or there was none a moment ago.
        """
        if _now() < self._rests_until:
            raise RedisUnavailable
        try:
            async with asyncio.timeout(self.timeout_seconds):
                answer = await question()
        except self._failures as error:
            self._rests_until = _now() + BACKOFF_SECONDS
            if self.up:
                logger.warning("the %s does not answer (%s)", self._subject, type(error).__name__)
            self.up = False
            raise RedisUnavailable from error
        if not self.up:
            logger.warning("the %s answers again", self._subject)
        self.up = True
        return answer

    async def close(self) -> None:
        """Leave Redis; what is there stays for the other replicas."""
        await self.client.aclose()
        await self.client.connection_pool.disconnect()


def _now() -> float:
    return asyncio.get_running_loop().time()
