"""Redis client with a timeout per command, and a pause after a command without an answer."""

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

# Without a pause, each call would wait for the whole timeout while Redis does not answer.
BACKOFF_SECONDS = 1.0
CONNECTIONS = 16

Answer = TypeVar("Answer")


class RedisUnavailable(Exception):
    """Redis does not answer, or answers with an error."""


class RedisClient:
    """A client that connects on its first command, and reconnects automatically.

    Args:
        url: redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], or rediss://...; the password is never logged.
        subject: the name of the stored data, for the log.
        timeout_seconds: the time limit of one command.

    Raises:
        ValueError: the URL is not a valid Redis URL.
        ImportError: the `redis` extra is not installed.
    """

    def __init__(self, url: str, *, subject: str, timeout_seconds: float) -> None:
        try:
            import redis.asyncio  # late: an optional extra
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import RedisError
        except ImportError as error:
            raise ImportError("Redis needs the redis extra; run pip install '.[redis]' in the clone") from error
        try:
            pool = redis.asyncio.BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=timeout_seconds,
                # One attempt only: a command that is sent twice could count twice.
                retry=Retry(NoBackoff(), 0),
                # With protocol 3, redis-py does not detect that a pooled connection is closed.
                protocol=2,
            )
        except ValueError:
            # The library's message may contain a part of the password.
            raise ValueError(
                "not a valid Redis URL; use redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], or rediss://..."
            ) from None
        self.client: Any = redis.asyncio.Redis(connection_pool=pool)
        self.up = True
        """Whether Redis answered the last command."""
        self._errors = (RedisError, OSError, TimeoutError)
        self.address = urlsplit(url).netloc.rpartition("@")[2]
        """Host and port, without the password."""
        self._subject = f"{subject} at {self.address}"
        self.timeout_seconds = timeout_seconds
        self._paused_until = -math.inf

    async def execute(self, command: Callable[[], Awaitable[Answer]]) -> Answer:
        """Return the answer to a command that uses `client`.

        Raises:
            RedisUnavailable: Redis does not answer, or did not answer within the last second.
        """
        if _now() < self._paused_until:
            raise RedisUnavailable
        return await self._run(command, BACKOFF_SECONDS)

    async def probe(self) -> None:
        """Update `up`, also during a pause; call it each second, so that no call waits for an answer in between."""
        with contextlib.suppress(RedisUnavailable):
            # The pause lasts until after the next probe: only the probes wait for a Redis that does not answer.
            await self._run(self.client.ping, 2 * BACKOFF_SECONDS + self.timeout_seconds)

    async def _run(self, command: Callable[[], Awaitable[Answer]], pause_seconds: float) -> Answer:
        try:
            async with asyncio.timeout(self.timeout_seconds):
                answer = await command()
        except self._errors as error:
            self._paused_until = _now() + pause_seconds
            if self.up:
                logger.warning("the %s does not answer (%s)", self._subject, type(error).__name__)
            self.up = False
            raise RedisUnavailable from error
        if not self.up:
            logger.warning("the %s answers again", self._subject)
        self.up, self._paused_until = True, -math.inf
        return answer

    async def rejection(self) -> str | None:
        """Return the reason why Redis rejects this client, such as a wrong password; None if it does not.

        Raises:
            OSError, TimeoutError: Redis does not answer, or is still starting.
        """
        from redis.exceptions import AuthenticationError, AuthorizationError, RedisError, ResponseError
        from redis.exceptions import ClusterDownError as ReplicaError  # MASTERDOWN included

        try:
            await self.client.ping()
        except (AuthenticationError, AuthorizationError, ResponseError) as error:
            if isinstance(error, ReplicaError):
                raise OSError(str(error)) from error
            return " ".join(str(error).split())
        except RedisError as error:
            raise OSError(str(error)) from error
        return None

    async def close(self) -> None:
        """Disconnect; the data stays in Redis for the other replicas."""
        await self.client.aclose()
        await self.client.connection_pool.disconnect()


def _now() -> float:
    return asyncio.get_running_loop().time()
