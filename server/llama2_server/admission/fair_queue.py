"""The order of waiting reservations: first come, first served within an account, in rounds over the accounts.

Each reservation has an order: its round, and the number of its arrival. A request joins the round after its account's
newest one, but never a round that is over. A call that returns at its retry time comes before the later calls of its
account, which move to later rounds, and a call that leaves lets them move to earlier ones: each account with waiting
calls is served once per round. Lists that are sorted by this order make an arrival cost O(log n) comparisons.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator

from llama2_server.admission.reservation import Order, Reservation


class FairQueue:
    """Waiting reservations. One that is ready is served before all others with a later order."""

    def __init__(self) -> None:
        self._orders: list[Order] = []  # of all reservations, sorted
        self._ready: list[tuple[Order, Reservation]] = []  # sorted; orders are unique
        self._by_account: dict[str, list[tuple[Order, Reservation]]] = {}  # sorted
        self._displaceable: dict[str, list[tuple[Order, Reservation]]] = {}  # sorted
        self._accounts_by_count: dict[int, dict[str, None]] = {}
        self._max_count = 0
        self._displacing: Counter[str] = Counter()  # requests per account that will displace another one
        self._round = 0
        self._served_in_round: set[str] = set()
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._orders)

    def count(self, account_id: str) -> int:
        """Return the number of reservations of one account."""
        return len(self._by_account.get(account_id, ()))

    def may_displace(self, account_id: str, *, counts_displacing: bool) -> bool:
        """Return whether a new request may displace one of the account with the most: with two fewer than that one."""
        own = self.count(account_id) + (self._displacing[account_id] if counts_displacing else 0)
        return own + 2 <= self._max_count

    def start_displacing(self, account_id: str) -> None:
        """Count a request that will displace another one, until `end_displacing`."""
        self._displacing[account_id] += 1

    def end_displacing(self, account_id: str) -> None:
        """Count the request no longer."""
        self._displacing[account_id] -= 1
        if not self._displacing[account_id]:
            del self._displacing[account_id]

    def pop_displaced(self) -> Reservation:
        """Remove and return the newest displaceable reservation of the account with the most; there is one."""
        account_id = next(iter(self._accounts_by_count[self._max_count]))
        reservation = self._displaceable[account_id][-1][1]
        self.remove(reservation)
        return reservation

    def next_order(self, account_id: str, ahead: int = 0) -> Order:
        """Return the order of a new request of an account, which has `ahead` more requests than its waiting ones."""
        self._arrivals += 1
        own = self._by_account.get(account_id)
        newest_round = own[-1][0][0] if own else self._round
        return max(newest_round, self._round) + 1 + ahead, self._arrivals

    def order(self, account_id: str, kept: Order | None) -> Order:
        """Return the order of a new request, or of one that keeps its order.

        That one is in no round that is over, and in no later one than a new request: the account may have fewer
        requests now than when the order was determined.
        """
        new = self.next_order(account_id)
        if kept is None:
            return new
        return max(min(kept[0], new[0]), self._round + (account_id in self._served_in_round)), kept[1]

    def position(self, order: Order) -> int:
        """Return how many reservations are served before one with this order."""
        return bisect_left(self._orders, order)

    def add(self, reservation: Reservation) -> None:
        """Add a reservation, which is not ready, in the first round after the earlier ones of its account."""
        account_id = reservation.account_id
        own_entries = self._by_account.setdefault(account_id, [])
        self._take_round(reservation, own_entries)
        entry = (reservation.order, reservation)
        insort(own_entries, entry)
        insort(self._orders, reservation.order)
        if reservation.displaceable:
            own = self._displaceable.setdefault(account_id, [])
            insort(own, entry)
            self._count_changed(account_id, len(own) - 1, len(own))

    def make_ready(self, reservation: Reservation) -> None:
        """Let a slot be granted to a waiting reservation."""
        insort(self._ready, (reservation.order, reservation))

    def remove(self, reservation: Reservation) -> None:
        """Remove a reservation, and let the later ones of its account move up; no-op if it has left already."""
        own = self._by_account.get(reservation.account_id, [])
        index = bisect_left(own, reservation.order, key=_order)
        if not self._remove_entries(reservation):
            return
        free_round = reservation.order[0]
        for position in range(index, len(own)):
            next_free, own[position] = own[position][0][0], self._move(own[position], free_round)
            free_round = next_free

    def _remove_entries(self, reservation: Reservation) -> bool:
        """Remove a reservation from all lists; return whether it was there."""
        account_id, entry = reservation.account_id, (reservation.order, reservation)
        if not _remove(self._by_account.get(account_id, []), entry):
            return False
        if not self._by_account[account_id]:
            del self._by_account[account_id]
        _remove(self._ready, entry)
        del self._orders[bisect_left(self._orders, reservation.order)]
        if reservation.displaceable:
            own = self._displaceable[account_id]
            _remove(own, entry)
            if not own:
                del self._displaceable[account_id]
            self._count_changed(account_id, len(own) + 1, len(own))
        return True

    def pop_next(self) -> Reservation | None:
        """Remove and return the first ready reservation whose request has not been cancelled; None without one."""
        while self._ready:
            reservation = self._ready[0][1]
            if reservation.decided.done():
                self.remove(reservation)
            else:
                self._remove_entries(reservation)
                self._start_round(reservation.order[0])
                self._served_in_round.add(reservation.account_id)
                return reservation
        return None

    def _start_round(self, number: int) -> None:
        if number > self._round:
            self._round = number
            self._served_in_round.clear()

    def clear(self) -> Iterator[Reservation]:
        """Remove all reservations, and yield them."""
        while self._by_account:
            reservation = next(iter(self._by_account.values()))[-1][1]
            self.remove(reservation)
            yield reservation

    def _take_round(self, reservation: Reservation, own: list[tuple[Order, Reservation]]) -> None:
        """Move the reservation, or the later ones of its account, so that no two are in the same round."""
        index = bisect_left(own, reservation.order, key=_order)
        while index and own[index - 1][0][0] == reservation.order[0]:
            reservation.order = reservation.order[0] + 1, reservation.order[1]
            index = bisect_left(own, reservation.order, key=_order)
        taken, end = reservation.order[0], index
        while end < len(own) and own[end][0][0] == taken:
            taken, end = taken + 1, end + 1
        for position in reversed(range(index, end)):
            own[position] = self._move(own[position], own[position][0][0] + 1)

    def _move(self, entry: tuple[Order, Reservation], number: int) -> tuple[Order, Reservation]:
        """Move a reservation to a round that is free in its account, past no other one; return its new entry."""
        order, reservation = entry
        reservation.order = number, order[1]
        moved = (reservation.order, reservation)
        del self._orders[bisect_left(self._orders, order)]
        insort(self._orders, reservation.order)
        if _remove(self._ready, entry):
            insort(self._ready, moved)
        if reservation.displaceable:
            displaceable = self._displaceable[reservation.account_id]
            displaceable[bisect_left(displaceable, order, key=_order)] = moved
        return moved

    def _count_changed(self, account_id: str, before: int, after: int) -> None:
        """Move an account to its new number of reservations, which differs by one."""
        if before:
            accounts = self._accounts_by_count[before]
            del accounts[account_id]
            if not accounts:
                del self._accounts_by_count[before]
        if after:
            self._accounts_by_count.setdefault(after, {})[account_id] = None
        if after > self._max_count or self._max_count not in self._accounts_by_count:
            self._max_count = after


def _order(entry: tuple[Order, Reservation]) -> Order:
    return entry[0]


def _remove(entries: list[tuple[Order, Reservation]], entry: tuple[Order, Reservation]) -> bool:
    """Remove an entry from a sorted list; return whether it was there."""
    index = bisect_left(entries, entry[0], key=_order)
    if index == len(entries) or entries[index][1] is not entry[1]:
        return False
    del entries[index]
    return True
