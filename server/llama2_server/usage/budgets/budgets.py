"""Reserve the highest price of each request in the budget of its account.

On one machine, the reservation and the running request are one transaction of the local database. With a usage store,
the reservation is in the store, so that all servers share the budget: the running request is stored first, so that
the request's record ends the reservation, whatever happens to the server.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import Protocol

from llama2_server.errors import BudgetExhausted, UsageUnavailable
from llama2_server.usage.budgets import statements
from llama2_server.usage.budgets.budget import BudgetOf, BudgetState, BudgetUse, Month, Reservation
from llama2_server.usage.errors import LedgerError, StoreUnavailable
from llama2_server.usage.pricing import ZERO_TOKENS, TokenUsage, decimal_text, neurons
from llama2_server.usage.records import RunningRequest, UsageRecord

_NOT_CHECKED = "the account's budget cannot be checked now; retry"


class SharedBudgets(Protocol):
    """The budgets in the usage store. Each operation raises StoreUnavailable if the store does not answer."""

    @property
    def up(self) -> bool:
        """Whether the store answered the last operation."""

    async def reserve(self, reservation: Reservation) -> BudgetUse | None:
        """Reserve; return what is spent and reserved if the reservation does not fit, otherwise None."""

    async def release(self, request_id: str) -> None:
        """Delete a reservation, if it exists."""

    async def budget_use(self, account_id: str, month: Month) -> BudgetUse:
        """Return what the account has spent and reserved in a month."""


LocalReader = Callable[[Callable[[sqlite3.Connection], BudgetUse]], Awaitable[BudgetUse]]
"""Returns the result of a query on the local database."""


class RunningRequests(Protocol):
    """The running requests of this server, in the local database."""

    async def start(
        self, request: RunningRequest, reserve: Callable[[sqlite3.Connection], BudgetUse | None]
    ) -> BudgetUse | None:
        """Commit a running request, unless `reserve` returns an exceeded budget in the same transaction; return it."""

    def withdraw(self, request_id: str) -> None:
        """Delete a running request, and its reservation in the local database."""

    def finish(self, request_id: str, outcome: str, tokens: TokenUsage) -> UsageRecord | None:
        """Write the record of a request."""


class Budgets:
    """The budgets of all accounts. An account without a budget costs nothing here.

    Args:
        budget_of: the budgets.
        neuron_costs: the card's prices.
        now: returns the time.
        read_local: reads the local database.
        shared: the budgets in the usage store; None without a store.
    """

    def __init__(
        self,
        budget_of: BudgetOf,
        neuron_costs: Mapping[str, Decimal],
        now: Callable[[], datetime],
        read_local: LocalReader,
        shared: SharedBudgets | None,
    ) -> None:
        self._budget_of = budget_of
        self._neuron_costs = neuron_costs
        self._now = now
        self._read_local = read_local
        self._shared = shared

    @asynccontextmanager
    async def reserved(
        self, request: RunningRequest, most: TokenUsage, requests: RunningRequests
    ) -> AsyncIterator[None]:
        """Reserve the price of `most` for the body, as `Ledger.reserved`."""
        reservation = self._reservation(request, most)
        if reservation is None:
            yield
            return
        try:
            exceeded = await requests.start(request, partial(self._reserve_locally, reservation))
            if exceeded is None:
                exceeded = await self._reserve_in_store(request, reservation, requests)
            if exceeded is not None:
                raise _exhausted(reservation, exceeded, self._now())
            yield
        finally:
            if not request.admitted:
                await self._withdraw(request, requests)

    async def state(self, account_id: str) -> BudgetState | None:
        """Return the state of an account's budget in this month; None without a budget.

        Raises:
            StoreUnavailable: the store does not answer.
            DatabaseUnavailable: the local database cannot be read (from `read_local`).
        """
        budget = self._budget_of(account_id)
        if budget is None:
            return None
        now = self._now()
        month = Month.of(now)
        if self._shared is None:
            use = await self._read_local(lambda connection: _read_use(connection, account_id, month))
        else:
            use = await self._shared.budget_use(account_id, month)
        return BudgetState(budget, use, month.seconds_left(now))

    def _reservation(self, request: RunningRequest, most: TokenUsage) -> Reservation | None:
        budget = self._budget_of(request.account_id)
        price = neurons(most, self._neuron_costs)
        if budget is None or not price:
            return None
        if self._shared is not None and not self._shared.up:
            raise UsageUnavailable(_NOT_CHECKED)
        return Reservation(request.request_id, request.account_id, request.started_at, price, budget)

    def _reserve_locally(self, reservation: Reservation, connection: sqlite3.Connection) -> BudgetUse | None:
        """Reserve, or return what is spent and reserved if the reservation does not fit; no-op with a store."""
        if self._shared is not None:
            return None
        use = _read_use(connection, reservation.account_id, reservation.month)
        if not reservation.fits(use):
            return use
        connection.execute(statements.INSERT, statements.for_sqlite(statements.insert_parameters(reservation)))
        return None

    async def _reserve_in_store(
        self, request: RunningRequest, reservation: Reservation, requests: RunningRequests
    ) -> BudgetUse | None:
        """Reserve, or return what is spent and reserved if the reservation does not fit; no-op without a store."""
        if self._shared is None:
            return None
        request.reserved_in_store = True  # also if the call is cancelled
        exceeded = None
        try:
            exceeded = await self._shared.reserve(reservation)
        except (StoreUnavailable, LedgerError) as error:
            request.reserved_in_store = False
            if isinstance(error, StoreUnavailable) and error.uncertain:  # a deletion could come before the reservation
                requests.finish(request.request_id, "UNAVAILABLE", ZERO_TOKENS)
            raise UsageUnavailable(_NOT_CHECKED) from error
        request.reserved_in_store = exceeded is None
        return exceeded

    async def _withdraw(self, request: RunningRequest, requests: RunningRequests) -> None:
        """Forget a request that was rejected; if its reservation cannot be deleted, a record of 0 tokens ends it."""
        try:
            if self._shared is not None and request.reserved_in_store:
                await self._shared.release(request.request_id)
            requests.withdraw(request.request_id)
        except (StoreUnavailable, LedgerError):
            requests.finish(request.request_id, "UNAVAILABLE", ZERO_TOKENS)
        except asyncio.CancelledError:
            requests.finish(request.request_id, "CANCELLED", ZERO_TOKENS)
            raise


def _read_use(connection: sqlite3.Connection, account_id: str, month: Month) -> BudgetUse:
    parameters = statements.for_sqlite(statements.use_parameters(account_id, month))
    return statements.use_of(connection.execute(statements.SELECT_USE, parameters).fetchone())


def _exhausted(reservation: Reservation, use: BudgetUse, now: datetime) -> BudgetExhausted:
    budget, spent, reserved, price = map(
        decimal_text, (reservation.budget, use.spent, use.reserved, reservation.neurons)
    )
    message = (
        f"account {reservation.account_id} has a budget of {budget} neurons per month: {spent} are spent, {reserved} "
        f"are reserved for running requests, and this request can cost {price}; lower max_tokens, or retry next month"
    )
    return BudgetExhausted(reservation.account_id, message, reservation.month.seconds_left(now))
