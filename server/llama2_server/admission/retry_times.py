"""The times at which rejected calls are told to return, so that the calls that return on time find space.

The times keep a distance that the queue can serve. No call states that it returns: the first equal call at or after
such a time counts as the one that was told.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar, overload

from llama2_server.admission.reservation import Order

EXPIRY_SECONDS = 5.0
"""Time after which a call that has not returned no longer counts."""
MAX_MINUTES = 10
"""An account counts for its quota of at most this many minutes, so that a client that ignores the times is bounded."""

Key = TypeVar("Key", bound=Hashable)


class CallIdentity(NamedTuple):
    """How a call is known when it returns. Without an equal call, another one of the same client can be it."""

    key: int
    """Equal for equal calls."""
    client: str = ""
    """Equal for calls of an account over one connection; empty if the connection is not known."""


NEW_CALL = CallIdentity(0)
"""A call that is never known."""


class ExpectedCall(NamedTuple):
    """A rejected call that is told to return."""

    account_id: str
    identity: CallIdentity
    order: Order | None
    """The order that the call keeps in the queue; None without one."""


class _RetryTime(NamedTuple):
    at: float  # by the event loop's clock
    number: int
    call: ExpectedCall


class _Times(Sequence[float]):
    """The times of a list. A copy would make each rejection of an account cost as much as it has times."""

    def __init__(self, times: list[_RetryTime]) -> None:
        self._times = times

    def __len__(self) -> int:
        return len(self._times)

    @overload
    def __getitem__(self, index: int) -> float: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...

    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        return _Times(self._times[index]) if isinstance(index, slice) else self._times[index].at


class RetryTimes:
    """The retry times of all rejected calls that have not returned."""

    def __init__(self) -> None:
        self._times: list[_RetryTime] = []  # sorted
        self._by_account: dict[str, list[_RetryTime]] = {}  # sorted
        self._by_call: dict[int, list[_RetryTime]] = {}  # sorted
        self._by_client: dict[str, list[_RetryTime]] = {}  # sorted
        self._busy: list[tuple[float, float]] = []  # sorted and disjoint: the times that are taken
        self._number = 0

    def of_account(self, account_id: str, now: float) -> Sequence[float]:
        """Return the times of an account, sorted; valid until the next call of another method."""
        self._expire(now)
        return _Times(self._by_account.get(account_id, []))

    def count(self, account_id: str, now: float) -> int:
        """Return the number of times of an account."""
        self._expire(now)
        return len(self._by_account.get(account_id, ()))

    def of_call(self, call_key: int, now: float) -> float | None:
        """Return the time of an equal call that is not due yet; None without one."""
        return next((time.at for time in self._by_call.get(call_key, ()) if time.at > now), None)

    def until(self, at: float, now: float) -> int:
        """Return the number of calls that are expected until a time, late calls included."""
        self._expire(now)
        return bisect_right(self._times, at, key=lambda time: time.at)

    def add(self, call: ExpectedCall, earliest: float, spacing: float, per_minute: int, now: float) -> float:
        """Return the first free time for a call that returns at `earliest` or later, and expect the call at that time.

        Args:
            call: the rejected call.
            earliest: a time of the event loop's clock.
            spacing: seconds that no other call gets from that time on.
            per_minute: the account's quota.
            now: the current time.
        """
        self._expire(now)
        at = self._take(earliest, spacing)
        own = self._by_account.setdefault(call.account_id, [])
        if len(own) < MAX_MINUTES * per_minute:
            self._number += 1
            time = _RetryTime(at, self._number, call)
            equal = self._by_call.setdefault(call.identity.key, [])
            of_client = self._by_client.setdefault(call.identity.client, [])
            for times in (self._times, own, equal, of_client):
                insort(times, time)
        return at

    def claim(self, identity: CallIdentity, now: float) -> ExpectedCall | None:
        """Return the expected call that returns now, and expect it no longer.

        It is an equal call that is due; without one, a due call of the same client, which has sent this call instead.
        """
        self._expire(now)
        time = _due(self._by_call.get(identity.key), now)
        if time is None and identity.client:
            time = _due(self._by_client.get(identity.client), now)
        if time is None:
            return None
        del self._times[bisect_left(self._times, time)]
        self._forget(time)
        return time.call

    def _take(self, earliest: float, spacing: float) -> float:
        busy = self._busy
        index = bisect_right(busy, (earliest, float("inf"))) - 1
        if index >= 0 and busy[index][1] >= earliest:
            start, at = busy[index]
        else:
            start = at = earliest
            index += 1
            busy.insert(index, (at, at))
        # A gap that is too short is lost: the neighbors become one.
        while index + 1 < len(busy) and busy[index + 1][0] < at + spacing:
            at = max(at, busy.pop(index + 1)[1])
        busy[index] = (start, at + spacing)
        return at

    def _expire(self, now: float) -> None:
        while self._times and self._times[0].at + EXPIRY_SECONDS < now:
            self._forget(self._times.pop(0))
        while self._busy and self._busy[0][1] < now:
            del self._busy[0]

    def _forget(self, time: _RetryTime) -> None:
        _remove(self._by_account, time.call.account_id, time)
        _remove(self._by_call, time.call.identity.key, time)
        _remove(self._by_client, time.call.identity.client, time)


def _due(times: list[_RetryTime] | None, now: float) -> _RetryTime | None:
    return times[0] if times and times[0].at <= now else None


def _remove(times: dict[Key, list[_RetryTime]], key: Key, time: _RetryTime) -> None:
    times[key].remove(time)
    if not times[key]:
        del times[key]
