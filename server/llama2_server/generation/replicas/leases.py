"""The leases of replies in Redis: which replica computes a reply, and its text so far.

A lease expires unless its owner renews it, and the text expires with it. The names of keys are digests. No key has the
prompt; the text of the reply is only in the stream.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from llama2_server.redis_client import RedisClient

LEASE_SECONDS = 2.0
RENEW_SECONDS = 0.5
# A slower answer would delay each new generation while it holds its slot.
STORE_TIMEOUT_SECONDS = 0.25

# KEYS of all scripts: the lease (a hash), the text (a stream), the readers by expiry, the seed of the next generation.
_FIND_SCRIPT = """
local seed = redis.call('HGET', KEYS[1], 'seed')
if seed then return {seed, 1} end
redis.call('SET', KEYS[4], ARGV[1], 'NX')
redis.call('PEXPIRE', KEYS[4], ARGV[2])
return {redis.call('GET', KEYS[4]), 0}
"""
_CLAIM_SCRIPT = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'seed', ARGV[2], 'fingerprint', ARGV[3], 'length', 0)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
"""
# A text is added only behind the length that its sender knows, so that a command can be sent again.
_PUBLISH_SCRIPT = """
local owner, published, text, length, reply_end, leaves, ttl = unpack(ARGV)
if redis.call('HGET', KEYS[1], 'owner') ~= owner then return {-1, 0} end
local time = redis.call('TIME')
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', time[1] * 1000 + math.floor(time[2] / 1000))
local readers = redis.call('ZCARD', KEYS[3])
if leaves == 'always' or leaves == 'unread' and readers == 0 then
  redis.call('DEL', KEYS[1], KEYS[2])
  return {-1, readers}
end
if text ~= '' and redis.call('HGET', KEYS[1], 'length') == published then
  redis.call('XADD', KEYS[2], '*', 'text', text)
  redis.call('HSET', KEYS[1], 'length', length)
end
local now = redis.call('HGET', KEYS[1], 'length')
if reply_end ~= '' and now == length then redis.call('HSET', KEYS[1], 'end', reply_end) end
redis.call('PEXPIRE', KEYS[1], ttl)
redis.call('PEXPIRE', KEYS[2], ttl)
return {tonumber(now), readers}
"""
_READ_SCRIPT = """
local reader, owner, from, ttl = unpack(ARGV)
local lease = redis.call('HMGET', KEYS[1], 'owner', 'seed', 'fingerprint', 'end')
if not lease[1] then return nil end
local time = redis.call('TIME')
redis.call('ZADD', KEYS[3], time[1] * 1000 + math.floor(time[2] / 1000) + ttl, reader)
redis.call('PEXPIRE', KEYS[3], ttl)
if lease[1] ~= owner then from = '0' end
local texts, entries = {}, redis.call('XREAD', 'STREAMS', KEYS[2], from)
for _, entry in ipairs(entries and entries[1][2] or {}) do
  from = entry[1]
  table.insert(texts, entry[2][2])
end
return {lease[1], lease[2], lease[3], lease[4] or '', from, table.concat(texts)}
"""


@dataclass(frozen=True, slots=True)
class ReplyEnd:
    """The end of a complete reply."""

    finish_reason: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Part:
    """A reply in progress on a replica, with the text since the last read."""

    owner: str
    seed: int
    fingerprint: str
    """Empty if the replica has none."""
    end: ReplyEnd | None
    position: str
    """The position at which the next read starts."""
    text: str


class ReplyLeases:
    """The leases of all replicas. Each method raises RedisUnavailable without an answer.

    Args:
        redis_url: the Redis of all replicas.
        seed_seconds: how long equal requests that wait for a slot agree on a seed.
    """

    def __init__(self, redis_url: str, *, seed_seconds: float) -> None:
        self._redis = RedisClient(
            redis_url, subject="store of shared generations", timeout_seconds=STORE_TIMEOUT_SECONDS
        )
        self._seed_milliseconds = round(seed_seconds * 1000)
        scripts = (_FIND_SCRIPT, _CLAIM_SCRIPT, _PUBLISH_SCRIPT, _READ_SCRIPT)
        self._find, self._claim, self._publish, self._read = map(self._redis.client.register_script, scripts)

    async def find(self, digest: str, seed: int) -> tuple[int, bool]:
        """Return the seed of equal requests, at first the given one, and whether a replica computes the reply."""
        agreed, leased = await self._run(self._find, digest, seed, self._seed_milliseconds)
        return int(agreed), bool(leased)

    async def claim(self, digest: str, owner: str, seed: int, fingerprint: str | None) -> bool:
        """Take the lease; return False if it is taken."""
        return bool(await self._run(self._claim, digest, owner, seed, fingerprint or "", _lease_milliseconds()))

    async def publish(
        self, digest: str, owner: str, published: int, text: str, end: ReplyEnd | None, leaves: str = ""
    ) -> tuple[int, int]:
        """Renew the lease, and add the text after the `published` characters.

        Args:
            digest: the request's digest.
            owner: the owner's name.
            published: the known length of the published text.
            text: the text that follows.
            end: the end of the reply behind this text, or None.
            leaves: `always` ends the lease, `unread` ends it without readers on other replicas.

        Returns:
            The length of the published text, or -1 if the lease has ended; and the number of readers.
        """
        ending = "" if end is None else json.dumps(asdict(end))
        arguments = (owner, published, text, published + len(text), ending, leaves, _lease_milliseconds())
        length, readers = await self._run(self._publish, digest, *arguments)
        return length, readers

    async def read(self, digest: str, reader: str, owner: str, position: str) -> Part | None:
        """Return the text after a position of this owner, or from the start of another owner's; None without a lease.

        It counts the reader until it has not read for the time of a lease.
        """
        found = await self._run(self._read, digest, reader, owner, position, _lease_milliseconds())
        if found is None:
            return None
        lease_owner, seed, fingerprint, end, new_position, text = (value.decode() for value in found)
        return Part(
            lease_owner, int(seed), fingerprint, ReplyEnd(**json.loads(end)) if end else None, new_position, text
        )

    async def leave(self, digest: str, reader: str) -> None:
        """Stop to count the reader."""
        await self._redis.execute(lambda: self._redis.client.zrem(_keys(digest)[2], reader))

    async def close(self) -> None:
        """Disconnect from Redis."""
        await self._redis.close()

    async def _run(self, script: Any, digest: str, *arguments: str | int) -> Any:
        return await self._redis.execute(lambda: script(keys=_keys(digest), args=arguments))


def _keys(digest: str) -> list[str]:
    # The braces keep the keys on one node of a Redis Cluster.
    lease = f"llama2:reply:{{{digest}}}"
    return [lease, f"{lease}:text", f"{lease}:readers", f"{lease}:seed"]


def _lease_milliseconds() -> int:
    return round(LEASE_SECONDS * 1000)
