"""The windows of a quota: when the requests of the last minute were allowed, in memory or in Redis."""

import asyncio
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from llama2_server.redis_client import RedisClient

STORE_TIMEOUT_SECONDS = 1.0

# KEYS: the account's window, a list of times in microseconds, newest first.
# ARGV: limit, window in microseconds, `read`, `consume` or `refund`, for `refund` the time of the consumed request, and
# the sorted times until expected calls come, as in free_requests.
# Returns the fields of Window.
_WINDOW_SCRIPT = """
local key, limit, window = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function expires_in(index)
  local entry = redis.call('LINDEX', key, index)
  return entry and tonumber(entry) + window - now
end
-- If Redis' clock was set back, requests with a later time count as made now, so that no wait exceeds one window.
local index = 0
while (expires_in(index) or 0) > window do
  redis.call('LSET', key, index, string.format('%.0f', now))
  index = index + 1
end
while (expires_in(-1) or 1) <= 0 do redis.call('RPOP', key) end
if ARGV[3] == 'refund' and redis.call('LREM', key, 1, ARGV[4]) == 0 and tonumber(ARGV[4]) > now then
  redis.call('LPOP', key)  -- the clock was set back, so that the request counts as made now
end
local used = redis.call('LLEN', key)
local free = limit - used
if #ARGV > 4 and free > 0 then
  local times = redis.call('LRANGE', key, 0, -1)
  local unused, expired = free, 0
  for index = 5, #ARGV do
    while expired < used and times[used - expired] + window - now <= tonumber(ARGV[index]) do expired = expired + 1 end
    free = math.min(free, unused + expired - (index - 4))
  end
end
local allowed = 0
if ARGV[3] == 'consume' and free > 0 then
  redis.call('LPUSH', key, string.format('%.0f', now))
  redis.call('PEXPIRE', key, math.ceil(window / 1000))
  allowed, used, free = 1, used + 1, free - 1
end
return {allowed, math.max(free, 0), used >= limit and expires_in(limit - 1) or 0, expires_in(0) or 0, now}
"""


class Window(NamedTuple):
    """The state of an account's window; times in microseconds."""

    allowed: bool
    """Whether a request was consumed."""
    free: int
    """Requests that are allowed now, without those that are kept for the given expected calls."""
    retry_in: int
    """Time until one more request is allowed without expected calls; 0 if one is now."""
    reset_in: int
    """Time until the window is empty."""
    now: int
    """Time of this state; if a request was consumed, it has this time."""


class LocalWindows:
    """The windows of this process, by the event loop's clock."""

    def __init__(self, window: int) -> None:
        self._window = window
        # Times of the allowed requests per account, oldest first; at most as many as the limit.
        self._allowed_at: defaultdict[str, deque[int]] = defaultdict(deque)

    def use(self, account_id: str, limit: int, *, consume: bool, expected_in: Sequence[int] = ()) -> Window:
        """Return the window, after consuming a request if `consume` is set and the expected calls leave one."""
        now = round(asyncio.get_running_loop().time() * 1e6)
        allowed_at = self._allowed_at[account_id]
        while allowed_at and allowed_at[0] + self._window <= now:
            allowed_at.popleft()
        expire_in = [at + self._window - now for at in allowed_at] if expected_in else allowed_at
        free = free_requests(limit, expire_in, expected_in)
        allowed = consume and free > 0
        if allowed:
            allowed_at.append(now)
            free -= 1
        retry_in = allowed_at[-limit] + self._window - now if len(allowed_at) >= limit else 0
        reset_in = allowed_at[-1] + self._window - now if allowed_at else 0
        return Window(allowed, max(free, 0), retry_in, reset_in, now)

    def refund(self, account_id: str, allowed_at: int) -> None:
        """Remove an allowed request; no-op if it has left the window."""
        with suppress(ValueError):
            self._allowed_at[account_id].remove(allowed_at)


def free_requests(limit: int, expire_in: Sequence[int], expected_in: Sequence[int]) -> int:
    """Return how many requests are allowed now so that each expected call is, too; 0 or less for none.

    Args:
        limit: requests per window.
        expire_in: sorted times until the requests in the window leave it; only their number counts if no call is
            expected.
        expected_in: sorted times until expected calls come, up to one window.
    """
    unused = free = limit - len(expire_in)
    if free <= 0:
        return free
    for number, expected in enumerate(expected_in, 1):
        free = min(free, unused + bisect_right(expire_in, expected) - number)
    return free


class RedisWindows:
    """The windows of all replicas, in Redis and by its clock; each call is one atomic script."""

    def __init__(self, url: str, window: int, model: str) -> None:
        self._redis = RedisClient(url, subject="quota store", timeout_seconds=STORE_TIMEOUT_SECONDS)
        self._script: Any = self._redis.client.register_script(_WINDOW_SCRIPT)
        self._window = window
        self._prefix = f"llama2:quota:{model}:"

    @property
    def up(self) -> bool:
        """Whether Redis answered the last command."""
        return self._redis.up

    async def probe(self) -> None:
        """Send a command, so that `up` is current."""
        await self._redis.probe()

    async def use(
        self, account_id: str, limit: int, operation: str, consumed_at: int = 0, expected_in: Sequence[int] = ()
    ) -> Window:
        """Run the script; raises RedisUnavailable."""
        keys, arguments = [self._prefix + account_id], [limit, self._window, operation, consumed_at, *expected_in]
        allowed, *times = await self._redis.execute(lambda: self._script(keys=keys, args=arguments))
        return Window(bool(allowed), *times)

    async def close(self) -> None:
        """Disconnect."""
        await self._redis.close()
