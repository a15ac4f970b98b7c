"""Limit the calls that cost nothing: a token bucket per account, and one for all calls without a valid API key.

They are CountTokens, GetUsage, GetModelCard and invalid requests. No usage record and no quota counts them, so without
a limit they could keep the event loop busy. Calls without a valid key never limit calls with one.
"""

import asyncio

from llama2_server.errors import TooManyRequests

PRUNE_BUCKETS = 1024
"""Number of buckets from which full ones are dropped."""


class CallBudget:
    """The buckets of all accounts, and the bucket of the calls without a valid key.

    Args:
        free_calls_per_minute: size of an account's bucket, which fills in a minute.
        keyless_calls_per_minute: size of the bucket of all calls without a valid key.
    """

    def __init__(self, free_calls_per_minute: int, keyless_calls_per_minute: int) -> None:
        self._accounts = TokenBuckets(free_calls_per_minute)
        self._keyless = TokenBuckets(keyless_calls_per_minute)

    def check(self, account_id: str) -> None:
        """Raise TooManyRequests if the account's bucket is empty."""
        if (seconds := self._accounts.wait_seconds(account_id)) > 0:
            message = f"account {account_id} makes too many calls that generate nothing; wait before the next call"
            raise TooManyRequests(message, seconds)

    def spend(self, account_id: str) -> None:
        """Take a token from the account's bucket, also from an empty one."""
        self._accounts.take(account_id)

    def take_keyless(self) -> None:
        """Take a token for a call without a valid key.

        Raises:
            TooManyRequests: the bucket is empty.
        """
        if (seconds := self._keyless.wait_seconds("")) > 0:
            raise TooManyRequests("too many calls without a valid API key arrive; send one with each call", seconds)
        self._keyless.take("")


class TokenBuckets:
    """A token bucket per key, by the clock of the event loop; a full bucket takes no memory."""

    def __init__(self, per_minute: int) -> None:
        self._token_seconds = 60 / per_minute
        self._full_at: dict[str, float] = {}
        self._prune_at = PRUNE_BUCKETS

    def __len__(self) -> int:
        return len(self._full_at)

    def wait_seconds(self, key: str) -> float:
        """Return the time until the bucket has a token; 0 if it has one."""
        missing_seconds = self._full_at.get(key, 0.0) - asyncio.get_running_loop().time()
        wait = missing_seconds + self._token_seconds - 60
        return wait if wait > 1e-6 else 0.0  # less is an error of floating-point numbers

    def take(self, key: str) -> None:
        """Take a token, also from an empty bucket."""
        now = asyncio.get_running_loop().time()
        self._full_at[key] = max(self._full_at.get(key, 0.0), now) + self._token_seconds
        if len(self._full_at) > self._prune_at:
            self._full_at = {key: at for key, at in self._full_at.items() if at > now}
            self._prune_at = max(PRUNE_BUCKETS, 2 * len(self._full_at))
