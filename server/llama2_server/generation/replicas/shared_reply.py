"""One reply that replicas share: a replica computes it, or follows the replica that does."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from llama2_server.engine.fingerprint.fingerprint import Fingerprint
from llama2_server.engine.sequence import FinishReason
from llama2_server.errors import EngineUnavailable, ShuttingDown
from llama2_server.generation.replicas.leases import RENEW_SECONDS, Part, ReplyEnd, ReplyLeases
from llama2_server.generation.replicas.reply_text import ReplyText
from llama2_server.generation.response_cache import CacheEntry
from llama2_server.redis_client import RedisUnavailable

# How often a reader reads, and at most how often an owner publishes.
POLL_SECONDS = 0.05

Result = Literal["computed", "joined", "recomputed", "failed", "unshared"]


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a replica shares its replies."""

    leases: ReplyLeases
    fingerprint: Fingerprint
    """The inputs that decide a text; without a value, another replica cannot continue a text."""
    count: Callable[[Result], None]
    """Is called with each result."""
    start: Callable[[Coroutine[Any, Any, None]], None]
    """Starts a task that can end after the generation."""


class LocalReply(Protocol):
    """A generation of this replica."""

    reply_text: ReplyText
    on_remote_readers: list[Callable[[], None]]
    """Called when the first reader on another replica has come, and when the last one has left."""

    @property
    def unread(self) -> bool:
        """Whether it continues without a reader on this replica."""

    @property
    def end(self) -> ReplyEnd | None:
        """The end of a complete reply."""

    @property
    def failed(self) -> bool:
        """Whether it was rejected, failed or was cancelled."""

    def add_text(self, text: str) -> None:
        """Add text; it fails if known text is repeated with a difference."""

    def stop(self) -> None:
        """End it without a reply."""


class SharedReply:
    """A generation's share in the lease of its request; it follows, claims and publishes in this order.

    Args:
        sharing: what it has in common with the replies of its replica.
        digest: the digest of the request.
        seed: the seed of the generation.
        stored: returns the reply from the response cache.
    """

    def __init__(
        self, sharing: Sharing, digest: str, seed: int, stored: Callable[[], Awaitable[CacheEntry | None]]
    ) -> None:
        self._leases = sharing.leases
        self._sharing = sharing
        self._digest = digest
        self._seed = seed
        self._stored = stored
        self._name = secrets.token_hex(8)
        self._leaving = False
        self._owned = False  # other replicas can read it
        self._alone = False  # the lease has another text, or cannot be read
        self._followed_fingerprint = ""
        self.joined = False
        """Whether it has text of another replica; it then costs nothing."""
        self.remote_readers = 0
        """The number of replicas that read it; at most half a second old."""

    async def claim(self, reply: LocalReply) -> bool:
        """Take the lease and publish the reply; return False if another replica has the lease.

        Without Redis, return True: the reply is then not shared.
        """
        if self._alone:
            return True
        try:
            self._owned = await self._leases.claim(
                self._digest, self._name, self._seed, self._sharing.fingerprint.value
            )
        except RedisUnavailable:
            return True
        except asyncio.CancelledError:  # Redis may have given the lease
            self._sharing.start(self._publish(reply))
            raise
        if self._owned:
            self._sharing.start(self._publish(reply))
        return self._owned

    async def take_stored(self, reply: LocalReply) -> ReplyEnd | None:
        """Take the reply that another replica has stored in the meantime, if it has one; return its end."""
        entry = await self._stored() if self._owned else None
        if entry is None or entry.seed != self._seed:
            self._sharing.count("recomputed" if self.joined else "computed" if self._owned else "unshared")
            return None
        if not self.joined:
            self._sharing.count("joined")
        self.joined = True
        reply.reply_text.repeat()
        reply.add_text(entry.text)
        return ReplyEnd(FinishReason[entry.finish_reason], entry.input_tokens, entry.output_tokens)

    async def follow(self, reply: LocalReply, is_serving: Callable[[], bool]) -> ReplyEnd | None:
        """Read the reply from the replica that computes it; None if this replica must compute it.

        Raises:
            EngineUnavailable: the text cannot be continued, because the fingerprints differ.
            ShuttingDown: this server no longer serves.
        """
        try:
            end = await self._read_until_end(reply, is_serving)
        finally:
            with suppress(RedisUnavailable):
                await self._leases.stop_reading(self._digest, self._name)
        if end is None and not reply.failed:
            self._check_continuable(reply)
            reply.reply_text.repeat()
        return end

    def cancel(self, reply: LocalReply) -> None:
        """End a reply without readers on this replica, unless other replicas read it."""
        self._leaving = True
        if self._owned:
            reply.reply_text.notify()
        else:
            reply.stop()

    def count_failure(self) -> None:
        """Count a reply that could not be continued."""
        self._sharing.count("failed")

    async def _read_until_end(self, reply: LocalReply, is_serving: Callable[[], bool]) -> ReplyEnd | None:
        owner, position, read_at = "", "0", _now()
        while _now() - read_at < self._leases.lease_seconds:
            if not is_serving():
                message = "the server shut down before the reply was complete; retry"
                raise ShuttingDown(message, refunds_quota=not reply.reply_text.value)
            with suppress(RedisUnavailable):
                part = await self._leases.read(self._digest, self._name, owner, position)
                if part is None:
                    return None
                if not self._fits(reply, part, owner):
                    break
                if part.owner != owner:
                    self._join(reply, part)
                read_at, owner, position = _now(), part.owner, part.position
                reply.add_text(part.text)
                if part.end is not None or reply.failed:
                    return part.end
            await asyncio.sleep(POLL_SECONDS)
        self._alone = True
        return None

    def _fits(self, reply: LocalReply, part: Part, owner: str) -> bool:
        """Return whether the owner of a lease computes the same text as this server and as the owner before."""
        own = self._sharing.fingerprint.value
        if part.seed != self._seed or (own and part.fingerprint and own != part.fingerprint):
            return False
        if part.owner == owner or not reply.reply_text.value:
            return True
        return bool(part.fingerprint) and part.fingerprint == self._followed_fingerprint

    def _join(self, reply: LocalReply, part: Part) -> None:
        if not self.joined:
            self._sharing.count("joined")
        self.joined, self._followed_fingerprint = True, part.fingerprint
        reply.reply_text.repeat()

    def _check_continuable(self, reply: LocalReply) -> None:
        fingerprint = self._sharing.fingerprint.value
        if reply.reply_text.value and not (fingerprint and fingerprint == self._followed_fingerprint):
            self.count_failure()
            raise EngineUnavailable(
                "the server that computed the reply has stopped, and another one would continue it with another "
                "fingerprint; retry"
            )

    async def _publish(self, reply: LocalReply) -> None:
        """Let other replicas read the reply until it ends, or the lease is lost."""
        published, renewed_at = 0, _now()
        try:
            while _now() - renewed_at < self._leases.lease_seconds:
                changed, ending = reply.reply_text.changed, self._ending(reply)
                text, end = reply.reply_text.value, reply.end
                try:
                    published, readers = await self._leases.publish(
                        self._digest, self._name, published, text[published:], end, ending
                    )
                except RedisUnavailable:
                    if ending:
                        break
                else:
                    if published < 0:
                        break
                    self._set_remote_readers(reply, readers)
                    if end is not None and published == len(text):
                        break
                    renewed_at = _now()
                await self._wait_for_change(changed)
        finally:
            self._owned = False
            self._set_remote_readers(reply, 0)
            if self._leaving:
                reply.stop()

    def _ending(self, reply: LocalReply) -> str:
        """Return when the lease ends before the reply does; see `ReplyLeases.publish`."""
        if reply.failed:
            return "now"
        # A later reader would get a reply for which no caller pays.
        return "unread" if (self._leaving or reply.unread) and reply.end is None else ""

    async def _wait_for_change(self, changed: asyncio.Event) -> None:
        await asyncio.sleep(POLL_SECONDS)
        if not self._leaving:
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEW_SECONDS - POLL_SECONDS):
                    await changed.wait()

    def _set_remote_readers(self, reply: LocalReply, readers: int) -> None:
        changed = bool(readers) != bool(self.remote_readers)
        self.remote_readers = readers
        if changed:
            for call in list(reply.on_remote_readers):
                call()


def _now() -> float:
    return asyncio.get_running_loop().time()
