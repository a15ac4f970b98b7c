"""The order of waiting entries: first come, first served within an account, round robin between accounts."""

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class RoundRobin(Generic[Entry]):
    """Waiting entries by account. Each served account moves to the end of the round."""

    def __init__(self) -> None:
        self._by_account: OrderedDict[str, deque[Entry]] = OrderedDict()  # the first account is next
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def count(self, account_id: str) -> int:
        """Return the number of entries of one account."""
        return len(self._by_account.get(account_id, ()))

    def largest(self) -> str | None:
        """Return the account with the most entries; None without entries."""
        return max(self._by_account, key=self.count, default=None)

    def add(self, account_id: str, entry: Entry) -> None:
        """Add an entry behind the account's other ones; a new account is last in the round."""
        self._by_account.setdefault(account_id, deque()).append(entry)
        self._size += 1

    def remove(self, account_id: str, entry: Entry) -> None:
        """Remove an entry; no-op if it has left already."""
        entries = self._by_account.get(account_id)
        if entries is not None and entry in entries:
            entries.remove(entry)
            self._size -= 1
            if not entries:
                del self._by_account[account_id]

    def pop_newest(self, account_id: str) -> Entry:
        """Remove and return the account's newest entry; raises KeyError if it has none."""
        entry = self._by_account[account_id][-1]
        self.remove(account_id, entry)
        return entry

    def pop_next(self, ready: Callable[[Entry], bool]) -> Entry | None:
        """Remove and return the first ready entry, whose account moves to the end; None if no entry is ready."""
        for account_id, entries in self._by_account.items():
            entry = next(filter(ready, entries), None)
            if entry is not None:
                self._by_account.move_to_end(account_id)
                self.remove(account_id, entry)
                return entry
        return None

    def clear(self) -> list[Entry]:
        """Remove and return all entries."""
        entries = [entry for entries in self._by_account.values() for entry in entries]
        self._by_account.clear()
        self._size = 0
        return entries

    def position(self, account_id: str) -> int:
        """Return how many entries are served before a new one of this account."""
        own = self.count(account_id)
        account_ids = list(self._by_account)
        place = account_ids.index(account_id) if own else len(account_ids)
        others = ((index, self.count(other)) for index, other in enumerate(account_ids) if other != account_id)
        return own + sum(min(waiting, own + (index < place)) for index, waiting in others)
