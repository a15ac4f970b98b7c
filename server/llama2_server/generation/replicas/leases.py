"""The leases of replies in Redis: which replica computes a reply, and its text so far.

A lease expires unless its owner renews it, and the text expires with it. The names of keys are digests. No key has the
prompt, the account or an API key; only the stream has text of the reply.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from llama2_server.engine.sequence import FinishReason
from llama2_server.redis_client import RedisClient, RedisUnavailable

LEASE_SECONDS = 2.0
RENEW_SECONDS = 0.5
# A slower answer would delay each new generation while it holds its slot.
STORE_TIMEOUT_SECONDS = 0.25
SEEDS = 2**64

Found = TypeVar("Found")

# KEYS of all scripts: the lease (a hash), the text (a stream), the readers by expiry, the seed of the next generation.
_FIND_SCRIPT = """
local seed = redis.call('HGET', KEYS[1], 'seed')
if seed then return {seed, 1} end
redis.call('SET', KEYS[4], ARGV[1], 'NX')
redis.call('PEXPIRE', KEYS[4], ARGV[2])
return {redis.call('GET', KEYS[4]), 0}
"""
# A key with another expiry is not a lease, and would block its request for too long.
_CLAIM_SCRIPT = """
local left = redis.call('PTTL', KEYS[1])
if left >= 0 and left <= tonumber(ARGV[4]) then return 0 end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'seed', ARGV[2], 'fingerprint', ARGV[3], 'length', 0)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
"""
# A text is added only after the length that its sender knows, so that a command can be sent again.
_PUBLISH_SCRIPT = """
local owner, published, text, length, reply_end, ending, ttl = unpack(ARGV)
if redis.call('HGET', KEYS[1], 'owner') ~= owner then return {-1, 0} end
local time = redis.call('TIME')
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', time[1] * 1000 + math.floor(time[2] / 1000))
local readers = redis.call('ZCARD', KEYS[3])
if ending == 'now' or ending == 'unread' and readers == 0 then
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
local left = redis.call('PTTL', KEYS[1])
if left < 0 or left > tonumber(ttl) then return nil end
local lease = redis.call('HMGET', KEYS[1], 'owner', 'seed', 'fingerprint', 'end')
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

    finish_reason: FinishReason
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Part:
    """A reply in progress on a replica, with the text since the last read."""

    owner: str
    seed: int
    fingerprint: str
    """Empty if the replica had none when it took the lease."""
    end: ReplyEnd | None
    position: str
    """The position at which the next read starts."""
    text: str


class ReplyLeases:
    """The leases of all replicas. Each method raises RedisUnavailable without an answer, or with an invalid one.

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

    @property
    def lease_seconds(self) -> float:
        """How long a lease exists after its last renewal."""
        return LEASE_SECONDS

    async def find(self, digest: str, seed: int) -> tuple[int, bool]:
        """Return the seed of equal requests, at first the given one, and whether a replica computes the reply."""
        return await self._run(self._find, _parse_seed, digest, seed, self._seed_milliseconds)

    async def claim(self, digest: str, owner: str, seed: int, fingerprint: str | None) -> bool:
        """Take the lease; return False if it is taken."""
        return await self._run(self._claim, bool, digest, owner, seed, fingerprint or "", _lease_milliseconds())

    async def publish(
        self, digest: str, owner: str, published: int, text: str, end: ReplyEnd | None, ending: str = ""
    ) -> tuple[int, int]:
        """Renew the lease, and add the text after the `published` characters.

        Args:
            digest: the request's digest.
            owner: the owner's name.
            published: the known length of the published text.
            text: the text that follows.
            end: the end of the reply after this text, or None.
            ending: `now` ends the lease, `unread` ends it if no other replica reads it.

        Returns:
            The length of the published text, or -1 if the lease has ended; and the number of readers.
        """
        arguments = (owner, published, text, published + len(text), _format_end(end), ending, _lease_milliseconds())
        return await self._run(self._publish, _parse_counts, digest, *arguments)

    async def read(self, digest: str, reader: str, owner: str, position: str) -> Part | None:
        """Return the text after a position of this owner, or from the start of another owner's; None without a lease.

        It counts the reader until it has not read for the time of a lease.
        """
        return await self._run(self._read, _parse_part, digest, reader, owner, position, _lease_milliseconds())

    async def stop_reading(self, digest: str, reader: str) -> None:
        """Stop counting the reader."""
        await self._redis.execute(lambda: self._redis.client.zrem(_keys(digest)[2], reader))

    async def close(self) -> None:
        """Disconnect from Redis."""
        await self._redis.close()

    async def _run(self, script: Any, parse: Callable[[Any], Found], digest: str, *arguments: str | int) -> Found:
        answer = await self._redis.execute(lambda: script(keys=_keys(digest), args=arguments))
        try:
            return parse(answer)
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # another program wrote it
            raise RedisUnavailable from error


def _keys(digest: str) -> list[str]:
    # The braces keep the keys on one node of a Redis Cluster. The number is the version of this format.
    lease = f"llama2:reply:1:{{{digest}}}"
    return [lease, f"{lease}:text", f"{lease}:readers", f"{lease}:seed"]


def _lease_milliseconds() -> int:
    return round(LEASE_SECONDS * 1000)


def _parse_seed(answer: Any) -> tuple[int, bool]:
    seed, leased = answer
    return _seed(seed), bool(leased)


def _parse_counts(answer: Any) -> tuple[int, int]:
    length, readers = answer
    return int(length), int(readers)


def _parse_part(answer: Any) -> Part | None:
    if answer is None:
        return None
    owner, seed, fingerprint, end, position, text = (value.decode() for value in answer)
    return Part(owner, _seed(seed), fingerprint, _parse_end(end), position, text)


def _seed(text: str | bytes) -> int:
    seed = int(text)
    if not 0 <= seed < SEEDS:
        raise ValueError("not a seed")
    return seed


def _format_end(end: ReplyEnd | None) -> str:
    return "" if end is None else f"{end.finish_reason.name} {end.input_tokens} {end.output_tokens}"


def _parse_end(text: str) -> ReplyEnd | None:
    if not text:
        return None
    name, input_tokens, output_tokens = text.split()
    reason, counts = FinishReason[name], (int(input_tokens), int(output_tokens))
    if reason in (FinishReason.CANCELLED, FinishReason.FAILED) or not all(0 <= count < 2**31 for count in counts):
        raise ValueError("not the end of a complete reply")
    return ReplyEnd(reason, *counts)
